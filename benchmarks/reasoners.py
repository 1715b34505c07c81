"""Every recipe with a goal, trained from three seeds, and two baselines; fills in docs/results.md and the README.

    python benchmarks/reasoners.py [--recipes parity p_hop] [--jobs 2] [--out benchmarks/results/reasoners.json]

Runs are kept in runs/reasoners; finished runs are not repeated, and stopped runs are resumed. Each run uses one thread;
the baselines have one seed. Takes about three hours on two cores. --no-train fills in the pages from existing runs.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from pages import table, write
from rich.console import Console
from rich.progress import track

from open_mythos import tasks
from open_mythos.evaluation import Evaluation, depth_grid
from open_mythos.evaluation.metrics import enough_loops
from open_mythos.training.fit import load_evaluation
from open_mythos.training.recipes import configured
from open_mythos.training.runs import load_model, training_config

ROOT = Path(__file__).parent.parent
PAGE, README = ROOT / "docs" / "results.md", ROOT / "README.md"
RUNS = ROOT / "runs" / "reasoners"
RUN_BY_RUN = (("looped", 0), ("single", 0), ("looped", 1), ("looped", 2), ("unrolled", 0))  # the most expensive last
BEYOND = 8  # multiple of the loops needed, at which no accuracy may be lost


@dataclass(frozen=True)
class Bar:
    """What a recipe must reach in ``measure`` at a difficulty and number of loops: mean and worst over seeds."""

    difficulty: int
    loops: int
    mean: float
    worst: float = 0.0
    measure: str = "accuracy"


BARS = {
    "parity": [Bar(96, 64, 0.999, 0.99), Bar(384, 256, 0.98, 0.95)],
    "prefix_sums": [Bar(512, 256, 0.99), Bar(512, 256, 0.90, measure="exact")],
    "chain_sum": [Bar(5, 12, 0.99), Bar(8, 16, 0.95), Bar(16, 32, 0.0)],
    "p_hop": [Bar(6, 16, 0.99), Bar(12, 32, 0.90)],
    "permutations": [Bar(24, 32, 0.95)],
    "addition": [Bar(20, 32, 0.95)],
}
WHAT = {
    "parity": "is the sum of the bits so far odd?",
    "prefix_sums": "sum of the binary digits so far",
    "chain_sum": "sum of a row of digits, modulo 7",
    "p_hop": "follow a chain of links",
    "permutations": "product of permutations of five elements",
    "addition": "add two long numbers",
}


def train(recipe: str, kind: str, seed: int) -> Path:
    """Run a recipe unless its evaluation exists, and return the run's folder."""
    run = RUNS / recipe / f"{kind}-{seed}"
    if not ended(run):
        command = [sys.executable, "-m", "open_mythos", "train", recipe, f"seed={seed}", f"kind={kind}"]
        log = RUNS / recipe / f"{kind}-{seed}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as output:
            subprocess.run(
                [*command, "--out", str(run), "--resume", "auto"],
                check=True, stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
    return run


def ended(run: Path) -> bool:
    """Whether the run has been trained and evaluated."""
    return (run / "evaluation.json").is_file()


def minutes(run: Path) -> float:
    """Minutes of training, without evaluation."""
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["seconds"] / 60


def at(found: Evaluation, difficulty: int, loops: int | None = None, measure: str = "accuracy") -> float:
    """One cell of the grid; without ``loops``, that of the last column, which is a baseline's only one."""
    grid = found.grids[0]
    column = -1 if loops is None else grid.loops.index(loops)
    return float(getattr(grid, measure)[grid.difficulties.index(difficulty)][column])


def beyond(recipe: str, run: Path) -> list[dict[str, float]]:
    """For each bar's difficulty: the loops needed, the accuracy at those, and at ``BEYOND`` times as many."""
    kept = run / "beyond.json"
    if not kept.is_file():
        model, cfg = load_model(str(run)), training_config(str(run))
        task, found = tasks.load(cfg.task.name, **cfg.task.options), []
        for difficulty, loops in {bar.difficulty: bar.loops for bar in BARS[recipe]}.items():
            examples = max(16, min(256, 8192 // task.length(difficulty)))
            needed = enough_loops(model, task, difficulty, loops, examples)
            grid = depth_grid(model, task, [difficulty], [needed, BEYOND * needed], examples, halting=False)
            there, deeper = grid.accuracy[0].tolist()
            found.append({"difficulty": difficulty, "needed": needed, "accuracy": there, "deeper": deeper})
        kept.write_text(json.dumps(found, indent=1) + "\n")
    return json.loads(kept.read_text())


def least_step(found: Evaluation) -> float:
    """The largest fall of accuracy below the best at fewer loops, as a negative number, or 0 if it never falls."""
    accuracy = found.grids[0].accuracy
    return float((accuracy - accuracy.cummax(1).values).min())


def fall(found: Evaluation) -> float:
    """The largest drop of accuracy from its best number of loops to a larger one, at any difficulty."""
    accuracy = found.grids[0].accuracy
    return max(float(row.max() - row[int(row.argmax()) :].min()) for row in accuracy)


def collect(recipe: str) -> dict[str, Any]:
    """All figures of a recipe, as lists over seeds."""
    runs: dict[str, list[Path]] = {"looped": [], "single": [], "unrolled": []}
    for kind, seed in RUN_BY_RUN:
        if ended(run := RUNS / recipe / f"{kind}-{seed}"):
            runs[kind].append(run)
    found = {kind: [load_evaluation(run) for run in of] for kind, of in runs.items()}
    result: dict[str, Any] = {"minutes": {kind: [minutes(run) for run in of] for kind, of in runs.items()}}
    looped = found["looped"]
    result["grids"] = [one.grids[0].to_dict() for one in looped]
    result["bars"] = [
        {
            **bar.__dict__,
            "looped": [at(one, bar.difficulty, bar.loops, bar.measure) for one in looped],
            "single": [at(one, bar.difficulty, None, bar.measure) for one in found["single"]],
            "unrolled": [at(one, bar.difficulty, None, bar.measure) for one in found["unrolled"]],
        }
        for bar in BARS[recipe]
    ]
    result["least_step"] = [least_step(one) for one in looped]
    result["fall"] = [fall(one) for one in looped]
    result["beyond"] = [beyond(recipe, run) for run in runs["looped"]]
    result["halting"] = [one.metrics["halting"] for one in looped]
    return result


def shown(values: list[float], digits: int = 4) -> str:
    """The mean, and the worst if there are several values; a dash if there are none."""
    if not values:
        return "–"
    worst = f" ({min(values):.{digits}f})" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{worst}"


def signed(x: float) -> str:
    """Four digits, without a minus before zero."""
    return f"{round(x, 4) + 0.0:.4f}"


def extra(values: list[float]) -> str:
    """Mean and worst (the largest) of accuracies lost, signed."""
    return f"{signed(mean(values))} ({signed(max(values))})"


def lost(gains: list[dict[str, float]]) -> list[float]:
    """Accuracy that early exit loses, by seed."""
    return [gain["accuracy_fixed"] - gain["accuracy_halting"] for gain in gains]


def shares(gains: list[dict[str, float]]) -> list[float]:
    """Loops that positions run with early exit, as a share of the fixed number, by seed."""
    return [gain["loops_halting"] / gain["loops_fixed"] for gain in gains]


def summary(results: dict[str, Any]) -> str:
    """The README's table: the hardest problems of every recipe."""
    columns = (
        "task", "trained on at most", "evaluated on", "accuracy, mean of 3 seeds (worst)", "no loop, same parameters",
        "no loop, same compute", "early exit, worst seed: loops run, accuracy lost",
    )  # fmt: skip
    rows = []
    for recipe, what in WHAT.items():
        result, cfg = results[recipe], configured(recipe)
        bar, unit = [bar for bar in result["bars"] if bar["measure"] == "accuracy"][-1], result["grids"][0]["unit"]
        rows.append([
            f"`{recipe}`: {what}", f"{cfg.task.max_difficulty} {unit}, {cfg.loops.maximum} loops",
            f"{bar['difficulty']} {unit}, {bar['loops']} loops", shown(bar["looped"], 3), shown(bar["single"], 3),
            shown(bar["unrolled"], 3), f"{max(shares(result['halting'])):.0%}, {max(lost(result['halting'])):.4f}",
        ])  # fmt: skip
    return "\n".join(table(columns, rows))


def markdown(results: dict[str, Any]) -> str:
    """The tables of the page."""
    lines = ["## Accuracy", "", *accuracy_table(results), "", "## Early exit", ""]
    lines += [
        "Problems of all measured difficulties in one batch. Fixed loops: every position runs the fewest loops that "
        "the hardest of these problems needs. Early exit: each position stops when the halting gate says so.",
        "", *exit_table(results), "", "## More loops than needed", "",
        "Accuracy at the loops that a difficulty needs (the fewest within .001 of the best accuracy) and at "
        f"{BEYOND} times as many; and the largest drop of accuracy from any depth to a deeper one, at any difficulty.",
        "", *deeper_table(results),
    ]  # fmt: skip
    return "\n".join(lines)


def accuracy_table(results: dict[str, Any]) -> list[str]:
    rows = []
    for recipe, result in results.items():
        for i, bar in enumerate(result.get("bars", ())):
            where = f"{bar['difficulty']} {result['grids'][0]['unit']}, {bar['loops']} loops"
            where += ", sequences without any error" if bar["measure"] == "exact" else ""
            goal = f"≥ {bar['mean']:g}" + (f" ({bar['worst']:g})" if bar["worst"] else "") if bar["mean"] else "none"
            looped, single, unrolled = (bar[kind] for kind in ("looped", "single", "unrolled"))
            name = f"`{recipe}`" if i == 0 else ""
            rows.append([name, where, goal, shown(looped), str(len(looped)), shown(single), shown(unrolled)])
    columns = ("recipe", "difficulty and loops", "goal: mean (worst seed)", "looped: mean (worst seed)", "seeds",
               "no loop, same parameters", "no loop, same compute")  # fmt: skip
    return table(columns, rows)


def exit_table(results: dict[str, Any]) -> list[str]:
    rows = []
    for recipe, result in results.items():
        if "halting" in result:
            gains = result["halting"]
            fixed, used = (mean(gain[name] for gain in gains) for name in ("loops_fixed", "loops_halting"))
            rows.append([
                f"`{recipe}`", f"{fixed:.0f}", f"{used:.1f}", f"{used / fixed:.0%} ({max(shares(gains)):.0%})",
                shown([gain["accuracy_fixed"] for gain in gains]),
                shown([gain["accuracy_halting"] for gain in gains]), extra(lost(gains)),
            ])  # fmt: skip
    columns = ("recipe", "fixed loops", "loops run with early exit", "share of the fixed loops (worst seed)",
               "accuracy, fixed loops (worst seed)", "accuracy, early exit (worst seed)",
               "accuracy lost (worst seed)")  # fmt: skip
    return table(columns, rows)


def deeper_table(results: dict[str, Any]) -> list[str]:
    rows = []
    for recipe, result in results.items():
        for i, cells in enumerate(zip(*result.get("beyond", ()), strict=True)):
            needed = [cell["needed"] for cell in cells]
            name, drop = (f"`{recipe}`", f"{max(result['fall']):.4f}") if i == 0 else ("", "")
            rows.append([
                name, f"{cells[0]['difficulty']} {result['grids'][0]['unit']}", f"{mean(needed):.0f} ({max(needed)})",
                shown([cell["accuracy"] for cell in cells]), shown([cell["deeper"] for cell in cells]),
                extra([cell["accuracy"] - cell["deeper"] for cell in cells]), drop,
            ])  # fmt: skip
    columns = ("recipe", "difficulty", "loops needed: mean (max)", "accuracy there (worst seed)",
               f"accuracy at {BEYOND} times as many loops (worst seed)", "accuracy lost (worst seed)",
               "largest drop at any difficulty and depth")  # fmt: skip
    return table(columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", choices=BARS, default=list(BARS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--no-train", action="store_true", help="collect finished runs, and train nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "reasoners.json")
    args = parser.parse_args()
    work = [] if args.no_train else [(recipe, kind, seed) for kind, seed in RUN_BY_RUN for recipe in args.recipes]
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = pool.map(lambda job: train(*job), work)
        list(track(jobs, total=len(work), description="training", console=Console(stderr=True), transient=True))
    results = json.loads(args.out.read_text())["results"] if args.out.is_file() else {}
    results |= {recipe: collect(recipe) for recipe in args.recipes if ended(RUNS / recipe / "looped-0")}
    results = {recipe: json.loads(json.dumps(results[recipe])) for recipe in BARS if recipe in results}
    conditions = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"conditions": conditions | {"threads": 1}, "results": results}, indent=1) + "\n")
    write(PAGE, markdown(results))
    if results.keys() >= WHAT.keys():
        write(README, summary(results))
    print(markdown(results))
    print(
        f"\nResults: {args.out}; page: {PAGE}; runs: {RUNS}. Next: mythos report {RUNS / args.recipes[0] / 'looped-0'}"
    )


if __name__ == "__main__":
    main()
