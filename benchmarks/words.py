"""The recipe of assignments in words, from several seeds, on prompts as long as trained and twice that.

    python benchmarks/words.py [--seeds 0 1 2] [--examples 256] [--out benchmarks/results/words.json]

Runs are kept in runs/words; one that has ended is not run again, one that was stopped goes on. One after the other,
each with all threads: about a quarter of an hour each on two cores.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from open_mythos import tasks
from open_mythos.evaluation import depth_grid
from open_mythos.training.runs import load_model

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "words"
# sentences of a prompt, hops, and what the mean and the worst seed must reach two loops after the last hop
BARS = [(32, 1, 0.99, 0.98), (32, 3, 0.99, 0.98), (32, 6, 0.99, 0.98), (32, 12, 0.98, 0.0), (32, 24, 0.95, 0.0),
        (64, 3, 0.95, 0.0), (64, 6, 0.95, 0.0), (64, 48, 0.85, 0.0)]  # fmt: skip
DEEPER = 4  # times the loops needed, at which at most .01 may be lost


def train(seed: int) -> Path:
    """Run the recipe unless its evaluation is there, and say where it is."""
    run = RUNS / f"assignments-{seed}"
    if not (run / "evaluation.json").is_file():
        command = [sys.executable, "-m", "open_mythos", "train", "assignments", f"seed={seed}"]
        subprocess.run([*command, "--out", str(run), "--resume", "auto"], check=True, cwd=ROOT)
    return run


def measured(run: Path, examples: int) -> list[dict[str, Any]]:
    """Accuracy of each row of ``BARS`` on the held-out split: a loop early, in time, a loop later, and deep."""
    model, rows = load_model(run), []
    for sentences, hops, *_ in track(BARS, f"evaluating {run.name}"):
        task = tasks.load("assignments", sentences=sentences, split="held_out")
        loops = [hops, hops + 1, hops + 2, DEEPER * (hops + 2)]
        curve = depth_grid(model, task, [hops], loops, examples, seed=1, halting=False).curve(hops)
        rows.append({"sentences": sentences, "hops": hops, "accuracy": curve})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "words.json")
    options = parser.parse_args()
    runs = [train(seed) for seed in options.seeds]
    results = [measured(run, options.examples) for run in runs]
    seconds = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["seconds"] for run in runs]
    shown = Table("sentences", "hops", "a loop early", "two loops after", f"{DEEPER} times the loops", "asked for", "")
    for i, (sentences, hops, least, worst) in enumerate(BARS):
        by_seed = [list(result[i]["accuracy"].values()) for result in results]
        early, _, late, deep = ([curve[k] for curve in by_seed] for k in range(4))
        holds = mean(late) >= least and min(late) >= worst and mean(late) - mean(deep) <= 0.01
        texts = [f"{mean(values):.3f} ({min(values):.3f})" for values in (early, late, deep)]
        shown.add_row(str(sentences), str(hops), *texts, f"{least} ({worst})", "holds" if holds else "missed")
    Console().print(shown)
    report = {
        "seeds": options.seeds, "examples": options.examples, "seconds": seconds, "rows": results,
        "torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"Results: {options.out}")


if __name__ == "__main__":
    main()
