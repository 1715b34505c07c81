"""The recipes of tasks in words, from several seeds, measured on sentences that were never in training.

    python benchmarks/words.py [--tasks assignments word_problems relations registers] [--seeds 0 1 2]
                               [--examples 256] [--out benchmarks/results/words.json]

Runs are kept in runs/words; finished runs are not repeated, and stopped runs are resumed. They run one after the other,
with all threads, a quarter to half an hour each on two cores. Tasks not in --tasks keep their results in --out.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from pages import table
from rich.console import Console
from rich.progress import track
from rich.table import Table

from open_mythos import tasks
from open_mythos.diagnostics.machine import describe
from open_mythos.evaluation import depth_grid
from open_mythos.training.runs import load_model

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "words"
# for each task: options of its problems, their difficulty, and the accuracies that the mean over seeds and the worst
# seed must reach in time, that is, with exactly the loops that the solution takes
BARS: dict[str, list[tuple[dict[str, int], int, float, float]]] = {
    "assignments": [
        *(({"sentences": 32}, hops, 0.99, 0.98) for hops in (1, 3, 6)), ({"sentences": 32}, 12, 0.98, 0.0),
        ({"sentences": 32}, 24, 0.95, 0.0), *(({"sentences": 64}, hops, 0.95, 0.0) for hops in (3, 6)),
        ({"sentences": 64}, 48, 0.85, 0.0),
    ],
    "word_problems": [*(({}, n, 0.97, 0.0) for n in (1, 2, 4, 6)), ({}, 9, 0.90, 0.0), ({}, 12, 0.80, 0.0)],
    "relations": [*(({}, hops, 0.98, 0.0) for hops in (1, 2, 3)), ({}, 6, 0.95, 0.0)],
    "registers": [*(({"lines": 24}, lines, 0.98, 0.0) for lines in (3, 6, 12)), ({"lines": 24}, 24, 0.95, 0.0)],
}  # fmt: skip
DEEPER = 4  # multiple of these loops, at which at most .01 may be lost
LOST_BY_HALTING = 0.005
SHARE_OF_LOOPS = 0.6  # of those, which halting may run at most


def train(task: str, seed: int) -> Path:
    """Run the recipe unless its evaluation exists, and return the run's folder."""
    run = RUNS / f"{task}-{seed}"
    if not (run / "evaluation.json").is_file():
        command = [sys.executable, "-m", "open_mythos", "train", task, f"seed={seed}"]
        subprocess.run([*command, "--out", str(run), "--resume", "auto"], check=True, cwd=ROOT)
    return run


def measured(task: str, run: Path, examples: int) -> list[dict[str, Any]]:
    """Accuracy of each row of ``BARS``, held out: in time, one loop fewer or more, 4 times the loops, with halting."""
    model, rows = load_model(run), []
    for options, difficulty, *_ in track(BARS[task], f"evaluating {run.name}"):
        problems = tasks.load(task, **options, split="held_out")
        needed = problems.n_steps(difficulty)
        loops = [needed - 1, needed, needed + 1, DEEPER * needed]
        row = {"options": options, "difficulty": difficulty}
        row["accuracy"] = depth_grid(model, problems, [difficulty], loops, examples, 1, halting=False).curve(difficulty)
        if model.cfg.halting:
            grid = depth_grid(model, problems, [difficulty], loops[-1:], examples, 1, halting=True)
            row |= {"halted": grid.accuracy.item(), "loops_used": grid.loops_used.item()}
        rows.append(row)
    return rows


def of_seeds(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Lists over seeds for one row of ``BARS``, by measurement; those of halting are empty without a gate."""
    names, gated = ("early", "in time", "a loop late", "deep"), [row for row in rows if "halted" in row]
    found = {name: [list(row["accuracy"].values())[i] for row in rows] for i, name in enumerate(names)}
    found |= {"halted": [row["halted"] for row in gated], "used": [row["loops_used"] for row in gated]}
    return found | {"share": [row["loops_used"] / int(list(row["accuracy"])[-1]) for row in gated]}


def mean_and_worst(values: list[float]) -> str:
    return f"{mean(values):.3f} ({min(values):.3f})" if values else ""


def shown(task: str, results: list[list[dict[str, Any]]]) -> Table:
    """Mean and worst over seeds, and whether the requirements are met."""
    columns = "one loop fewer", "in time", f"{DEEPER} times the loops", "with halting", "loops run", "required", ""
    rich = Table("", tasks.load(task).unit, *columns, title=task)
    for i, (options, difficulty, least, worst) in enumerate(BARS[task]):
        found = of_seeds([result[i] for result in results])
        late, deep, halted, used = (found[key] for key in ("in time", "deep", "halted", "used"))
        holds = mean(late) >= least and min(late) >= worst and mean(late) - mean(deep) <= 0.01
        if halted:
            holds &= mean(deep) - mean(halted) <= LOST_BY_HALTING and mean(found["share"]) <= SHARE_OF_LOOPS
        cells = [mean_and_worst(found[key]) for key in ("early", "in time", "deep", "halted")]
        said = " ".join(f"{key}={value}" for key, value in options.items())
        asked = f"{least}" + (f" ({worst})" if worst else "")
        rich.add_row(
            said, str(difficulty), *cells, f"{mean(used):.1f}" if used else "", asked, "holds" if holds else "missed"
        )
    return rich


def markdown(results: dict[str, Any]) -> str:
    """The table of the docs: mean and worst seed for each task."""
    columns = "", "in time", f"{DEEPER} times the loops", "with halting", "loops run with halting", "required in time"
    lines = []
    for task, found in results.items():
        for (options, difficulty, least, _), *rows in zip(BARS[task], *found["rows"], strict=True):
            row = of_seeds(rows)
            share = f"{mean(row['share']):.0%}" if row["share"] else ""
            made = ", ".join([f"`{task}`", *(f"{n} {key}" for key, n in options.items())])
            cells = [mean_and_worst(row[key]) for key in ("in time", "deep", "halted")]
            unit = tasks.load(task).unit.removesuffix("s" if difficulty == 1 else "")
            lines.append([f"{made}, {difficulty} {unit}", *cells, share, f"{least:g}"])
    return "\n".join(table(columns, lines, numbers=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tasks", nargs="+", choices=BARS, default=list(BARS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "words.json")
    options = parser.parse_args()
    report = json.loads(options.out.read_text())["results"] if options.out.is_file() else {}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for task in options.tasks:
        runs = [train(task, seed) for seed in options.seeds]
        results = [measured(task, run, options.examples) for run in runs]
        seconds = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["seconds"] for run in runs]
        Console().print(shown(task, results))
        report[task] = {
            "seeds": options.seeds, "examples": options.examples, "seconds": seconds, "rows": results,
            "conditions": describe(torch.device("cpu")),
        }  # fmt: skip
        options.out.write_text(json.dumps({"results": report}, indent=1) + "\n")
    print(f"{markdown(report)}\n\nResults: {options.out}")


if __name__ == "__main__":
    main()
