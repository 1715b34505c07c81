"""Do loops pay on text? A looped model compared with its four baselines, and one model at any number of loops.

    python benchmarks/language.py [--steps 2000] [--seeds 0 1 2] [--rates 5e-4 1e-3]
                                  [--out benchmarks/results/language.json]

Both parts train on the source code of Python's standard library, as the recipe `text` does. The first is `mythos
compare` of a model that is supervised after its last loop only, and whose state keeps more of the previous one: it
measures how much of the gap between one pass and unrolled loops is closed. The second is the recipe itself, which is
supervised after every loop, and therefore also predicts well at one loop. Runs are kept in runs/language; finished runs
are not repeated. Takes about four hours: runs are made one after the other, with one thread.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from pages import table, write

from open_mythos.diagnostics.machine import describe
from open_mythos.training import compare
from open_mythos.training.fit import load_evaluation

ROOT = Path(__file__).parent.parent
RUNS, PAGE = ROOT / "runs" / "language", ROOT / "docs" / "language.md"
NAMES = {
    "looped": "looped",
    "single": "single: the parameters of looped, one pass",
    "wide": "wide: the operations of looped, one pass",
    "unrolled": "unrolled: four blocks with weights of their own",
    "plain": "plain: the same depth, without injection and state norm",
}
SHALLOW, DEEPER = 0.05, 0.005  # bits that may be lost: one loop against single; 4 times the trained loops against these


def mythos(*words: str) -> None:
    """Run a command with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "open_mythos", *words], check=True, cwd=ROOT, env=environment)


def any_depth(steps: int, seeds: list[int]) -> list[dict[str, float]]:
    """Bits per byte of the recipe's model by loops, for each seed."""
    found = []
    for seed in seeds:
        run = RUNS / f"any-depth-{seed}"
        if not (run / "evaluation.json").is_file():
            mythos("train", "text", f"seed={seed}", f"steps={steps}", "--out", str(run), "--resume", "auto")
        found.append({str(loops): bits for loops, bits in load_evaluation(run).items()})
    return found


def markdown(results: dict[str, Any]) -> str:
    """The tables of the page."""
    compared, curves = results["compare"], results["any_depth"]
    loops = compared["trained_loops"]
    rows = []
    for one in compared["contenders"]:
        column = one["loops"].index(loops) if one["kind"] == "looped" else 0
        low, high = one["low"][0][column], one["high"][0][column]
        rows.append([
            NAMES[one["kind"]], f"{one['parameters']:,}", f"{one['training_flops']:.1e}", f"{one['lr']:g}",
            f"{one['mean'][0][column]:.4f} ({one['worst'][0][column]:.4f})", f"{low:.4f} – {high:.4f}",
        ])  # fmt: skip
    columns = (
        "model", "parameters", "training FLOPs", "learning rate", "bits per byte: mean (worst seed)", "95% interval",
    )  # fmt: skip
    lines = [f"## At {loops} loops", "", *table(columns, rows, numbers=True), "", *compared["worth"], ""]
    kinds = list(compared["contenders"][0]["by_token"])
    rows = [[one["kind"], *(f"{one['by_token'][kind]:.3f}" for kind in kinds)] for one in compared["contenders"]]
    lines += ["Bits per byte by kind of token:", "", *table(("", *kinds), rows, numbers=True), ""]
    single = next(one for one in compared["contenders"] if one["kind"] == "single")
    counts = list(curves[0])
    rows = [[f"seed {seed}", *(f"{curve[n]:.4f}" for n in counts)] for seed, curve in enumerate(curves)]
    rows.append(["mean", *(f"{mean(curve[n] for curve in curves):.4f}" for n in counts)])
    lines += ["## At any number of loops", "", *table(("loops", *counts), rows, numbers=True), ""]
    one, trained, deep = (mean(curve[str(n)] for curve in curves) for n in (1, loops, 4 * loops))
    worst = max(curve[str(4 * loops)] - curve[str(loops)] for curve in curves)
    lines.append(
        f"At one loop the model has {one - single['mean'][0][0]:+.4f} bits per byte against single (required: at most "
        f"{SHALLOW:+g}); at {4 * loops} loops {deep - trained:+.4f} against {loops} loops, {worst:+.4f} on the worst "
        f"seed (required: at most {DEEPER:+g})."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", default=["5e-4", "1e-3"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "language.json")
    options = parser.parse_args()
    mythos(
        "compare", "text", f"steps={options.steps}", "loss.depth=final", "model.injection_decay=0.7",
        "--seeds", ",".join(map(str, options.seeds)), "--rates", ",".join(options.rates),
        "--out", str(RUNS / "compare"),
    )  # fmt: skip
    compared = compare.load(RUNS / "compare" / compare.RESULTS)
    results = {"compare": compared, "any_depth": any_depth(options.steps, options.seeds)}
    conditions = describe(torch.device("cpu")) | {"threads": 1, "steps": options.steps}
    options.out.write_text(json.dumps({"conditions": conditions, "results": results}, indent=1) + "\n")
    write(PAGE, markdown(results))
    print(markdown(results))
    print(f"\nResults: {options.out}; page: {PAGE}; runs: {RUNS}. Next: mythos report {RUNS / 'any-depth-0'}")


if __name__ == "__main__":
    main()
