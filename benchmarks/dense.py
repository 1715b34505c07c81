"""A looped model with experts compared with a dense Transformer of twice the parameters; fills in docs/dense.md.

    python benchmarks/dense.py [--seeds 0 1 2] [--jobs 2] [--repeat 7] [--only loss|speed] [--out FILE]

Both consist of this library's own blocks and are trained on the same text, for the same steps, with the same optimizer,
each with the learning rate, out of three, that is best for it on seed 0. The looped model is trained once, with 1 to 8
loops at random, and measured at several depths; at 8 loops it does as many operations per token as the dense model.
Speed and memory are measured as in speed.py: in processes that take turns, with one thread each. Takes a quarter of an
hour on two cores. Trained models are kept in runs/dense, and stopped training is resumed. Other work on the machine
distorts the results.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import date
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from pages import spread, table, write
from rich.console import Console
from rich.progress import track
from speed import measure
from speed_cases import Case, Task

from open_mythos import MythosConfig
from open_mythos.diagnostics import cache_bytes_per_token, flops_per_token, parameters
from open_mythos.diagnostics.machine import describe
from open_mythos.training.config import LoopConfig, TrainConfig
from open_mythos.training.fit import Watch, fit, load_evaluation
from open_mythos.training.recipes import recipe
from open_mythos.variants import dense_beside, mythos_800k

ROOT = Path(__file__).parent.parent
PAGE, RUNS = ROOT / "docs" / "dense.md", ROOT / "runs" / "dense"
LOOPS = (1, 2, 4, 8)
RATES = (2.5e-4, 5e-4, 1e-3)
CONTEXT, TRAINED, FP32 = 512, (8, 128), 4  # tokens of a prompt; rows and tokens of a training step; bytes

LOOPED, DENSE = mythos_800k(), cast(MythosConfig, dense_beside(mythos_800k()))
MODELS = {"looped": (LOOPED, LOOPS), "dense": (DENSE, (1,))}


# -- loss


def run_config(name: str, rate: float, seed: int) -> TrainConfig:
    """The text recipe, with this model, rate and seed."""
    model, loops = MODELS[name]
    cfg = recipe("text")
    cfg.model, cfg.seed, cfg.optim.lr = model, seed, rate
    cfg.batch_size, cfg.task.min_difficulty, cfg.task.max_difficulty = TRAINED[0], TRAINED[1], TRAINED[1]
    cfg.loops = LoopConfig("uniform", minimum=1, maximum=max(loops), gradient="all")
    cfg.evaluation.loops = list(loops)
    return cfg


def bits(cfg: TrainConfig, run: Path) -> dict[int, float]:
    """Held-out bits per byte of a run by loops; the run is started or resumed first unless it has ended."""
    torch.set_num_threads(1)
    if not (run / "evaluation.json").is_file():
        fit(cfg, run, "auto", Watch(log=lambda message: None))
    found = load_evaluation(run)
    assert isinstance(found, dict)
    return found


def losses(seeds: list[int], jobs: int) -> dict[str, Any]:
    """For each model: the best rate (first seed, most loops), the bits at every rate, and the bits of every seed."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:

        def all_bits(asked: list[tuple[str, float, int]], what: str) -> list[dict[int, float]]:
            runs = [RUNS / f"{name}-{rate:g}-{seed}" for name, rate, seed in asked]
            found = pool.map(bits, [run_config(*job) for job in asked], runs)
            return list(track(found, what, len(asked), console=Console(stderr=True), transient=True))

        tried = [(name, rate, seeds[0]) for name in MODELS for rate in RATES]
        deepest = (found[max(found)] for found in all_bits(tried, "learning rates"))
        by_rate = dict(zip(tried, deepest, strict=True))
        rates = {name: min(RATES, key=lambda rate: by_rate[name, rate, seeds[0]]) for name in MODELS}
        chosen = [(name, rates[name], seed) for name in MODELS for seed in seeds]
        found = dict(zip(chosen, all_bits(chosen, "seeds"), strict=True))
    return {
        name: {
            "rate": rates[name],
            "by_rate": {f"{rate:g}": by_rate[name, rate, seeds[0]] for rate in RATES},
            "bits": {str(n): [found[name, rates[name], seed][n] for seed in seeds] for n in loops},
        }
        for name, (_, loops) in MODELS.items()
    }


# -- speed and memory


def case(work: str, what: str, engine: str = "fused") -> Case:
    """The dense model and the looped model at every number of loops, doing this work; ratios are to the dense model."""
    batch, tokens = TRAINED if work in ("train", "memory") else (1, CONTEXT)
    sides = {}
    for name, (model, loops) in MODELS.items():
        sizes = {key: value for key, value in asdict(model).items() if key != "halting"}
        for n in loops:
            sides[side(name, n)] = Task("ours", work, sizes, n, batch, tokens, engine=engine)
    return Case(what, sides, [(name, "dense") for name in sides if name != "dense"])


def side(name: str, loops: int) -> str:
    return name if name == "dense" else f"{name} {loops}"


CASES = {
    "train": case("train", "training"),
    "prefill": case("prefill", "prompts"),
    "decode": case("decode", "decoding"),
    "compiled": case("decode", "decoding, compiled", "native"),
    "memory": case("memory", "memory of a training step"),
}
UNIT = {"memory": "growth MB"}  # for the others: tokens/s


def speeds(repeat: int, say: Any) -> dict[str, Any]:
    """For every case and side, the measurement of each turn."""
    found = {}
    for name, asked in CASES.items():
        turns = measure(asked, {"ours": Path(sys.executable)}, 1, repeat, partial(_say, say, name))
        unit = UNIT.get(name, "tokens/s")
        found[name] = {of: sides[unit] for of, sides in turns["sides"].items()}
    return found


def _say(say: Any, name: str, what: str) -> None:
    say(f"{name}: {what}")


# -- results


def rows(results: dict[str, Any]) -> Iterator[list[str]]:
    """A line for each number of loops of the looped model, and one for the dense model."""
    loss, speed = results["loss"], results["speed"]
    for name, (cfg, loops) in MODELS.items():
        count = parameters(cfg)
        for n in loops:
            found = loss[name]["bits"][str(n)]
            reached = {what: median(sides[side(name, n)]) for what, sides in speed.items() if side(name, n) in sides}
            step = math.prod(TRAINED) / reached["train"]
            yield [
                f"looped, {n} loop{'s' * (n > 1)}" if name == "looped" else "dense, 6 layers",
                f"{count.total / 1e6:.2f} ({count.active / 1e6:.2f})",
                spread(found),
                f"{flops_per_token(cfg, n, CONTEXT) / 1e6:.2f}",
                f"{1000 * CONTEXT / reached['prefill']:.0f}",
                f"{1000 / reached['decode']:.2f}",
                f"{1000 / reached['compiled']:.2f}" if "compiled" in reached else "",
                f"{1000 * step:.0f}",
                f"{reached['memory']:.0f}",
                f"{cache_bytes_per_token(cfg, n, FP32) / 1000:.1f}",
            ]


def markdown(results: dict[str, Any]) -> str:
    """The table of the page."""
    columns = [
        "model", "parameters, M (active)", "held-out bits per byte: mean (min – max)", "MFLOP per token", "prompt, ms",
        "decoding, ms per token", "decoding in compiled C, ms per token", "training step, ms",
        "memory of a training step, MB", "cache, kB per token",
    ]  # fmt: skip
    at = results["conditions"]
    where = (
        f"{at['name']}, one thread, torch {at['torch']}, {at['date']}; load average before timing: {at['load']:.1f} "
        "(0 on an idle machine)."
    )
    return "\n".join([where, "", *table(columns, rows(results), numbers=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="models trained at the same time, with one thread each")
    parser.add_argument("--repeat", type=int, default=7, help="turns that every side takes")
    parser.add_argument("--only", choices=("loss", "speed"), help="measure only this, keep the other results")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "dense.json")
    args = parser.parse_args()
    console, screen = Console(), Console(stderr=True)
    torch.set_num_threads(1)
    results = json.loads(args.out.read_text()) if args.out.is_file() else {}
    if args.only != "speed":
        results["loss"] = losses(args.seeds, args.jobs)
        results["seeds"] = args.seeds
    if args.only != "loss":
        load = os.getloadavg()[0]
        with screen.status("") as status:
            results["speed"] = speeds(args.repeat, status.update)
        results["conditions"] = describe(torch.device("cpu")) | {"date": date.today().isoformat(), "load": load}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    if results.keys() >= {"loss", "speed"}:
        write(PAGE, markdown(results))
        console.print(markdown(results), highlight=False, soft_wrap=True)
    console.print(f"Results: {args.out}; trained models: {RUNS}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
