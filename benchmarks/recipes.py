"""The memory that the recipes for a 12 GB GPU need, estimated on this CPU; fills in docs/recipes.md.

    python benchmarks/recipes.py [--only NAME ...] [--out benchmarks/results/recipes.json]

Each model has its full size, but few rows: steps with 1 and 2 rows show how many bytes a row keeps for the backward
pass, and how many are kept in any case. Weights, gradients, averages and the optimizer's state are counted exactly.
Takes a few minutes.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pages import table, write
from rich.console import Console

from open_mythos.diagnostics import parameters
from open_mythos.diagnostics.machine import describe
from open_mythos.training.config import TrainConfig
from open_mythos.training.cost import activation_bytes, flops_per_step, weight_bytes
from open_mythos.training.recipes import configured
from open_mythos.training.trainer import Trainer

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "recipes.md"
EXPERTS = "model.n_experts=8 model.n_experts_per_tok=2 model.n_shared_experts=1"


@dataclass(frozen=True)
class Recipe:
    """A run: its name, its purpose, and the arguments of ``mythos train text``, line by line."""

    name: str
    what: str
    words: tuple[str, ...]

    @property
    def assignments(self) -> list[str]:
        return " ".join(self.words).split()

    @property
    def command(self) -> str:
        return " \\\n    ".join(["mythos train text", *self.words, f"--out runs/{self.name}"])


def context(tokens: int) -> str:
    return f"task.min_difficulty={tokens} task.max_difficulty={tokens} evaluation.difficulties={tokens}"


RECIPES = (
    Recipe("small", "The first one to try.", (
        f"model.dim=256 {EXPERTS} model.expert_dim=256", context(512),
        "batch_size=128 accumulate=2 precision=bf16 steps=5000",
    )),
    Recipe("deep", "Sixteen loops, which are computed again in the backward pass.", (
        f"model.dim=256 {EXPERTS} model.expert_dim=256", context(512),
        "loops.mean=16 loops.maximum=16 checkpoint_loops=true",
        "batch_size=256 precision=bf16 steps=5000",
    )),
    Recipe("long", "A context of 4096 tokens.", (
        f"model.dim=256 {EXPERTS} model.expert_dim=256", context(4096),
        "batch_size=32 accumulate=4 precision=bf16 steps=5000",
    )),
    Recipe("medium", "Twice as wide.", (
        "model.dim=512 model.n_heads=8 model.n_kv_heads=4", f"{EXPERTS} model.expert_dim=512", context(1024),
        "batch_size=64 accumulate=4 precision=bf16 steps=10000",
    )),
    Recipe("large", "50 million parameters, and two blocks before and after the loop.", (
        "model.dim=768 model.n_heads=12 model.n_kv_heads=4 model.prelude_layers=2 model.coda_layers=2",
        "model.n_experts=16 model.n_experts_per_tok=2 model.n_shared_experts=1 model.expert_dim=768",
        context(1024), "batch_size=96 accumulate=2 precision=bf16 checkpoint_loops=true steps=20000",
    )),
)  # fmt: skip


def of_rows(cfg: TrainConfig, rows: int) -> tuple[int, int]:
    """Bytes of weights, gradients, averages and optimizer state; and of activations, in the second step."""
    cfg.batch_size, cfg.accumulate, cfg.device = rows, 1, "cpu"
    trainer = Trainer(cfg)
    activations = activation_bytes(trainer, 1)
    return weight_bytes(trainer), activations


def estimate(recipe: Recipe) -> dict[str, Any]:
    """The bytes that one run needs; for activations, a constant and a number for each row of a micro-batch."""
    cfg = configured("text", recipe.assignments)
    flops = flops_per_step(cfg) / cfg.batch_size
    weights, one = of_rows(cfg, 1)
    _, two = of_rows(cfg, 2)
    count = parameters(cfg.model)
    return {"parameters": count.total, "active": count.active, "flops_a_row": flops, "weights": weights,
            "a_row": two - one, "anyway": max(0, 2 * one - two)}  # fmt: skip


def line(recipe: Recipe, found: dict[str, Any]) -> list[str]:
    cfg = configured("text", recipe.assignments)
    rows = cfg.batch_size // cfg.accumulate
    activations = found["anyway"] + rows * found["a_row"]
    with_gradient = "all" if cfg.loops.gradient == "all" else str(cfg.loops.grad_loops)
    return [
        recipe.name, f"{found['parameters'] / 1e6:.1f} ({found['active'] / 1e6:.1f})", f"{cfg.task.max_difficulty:,}",
        f"{cfg.accumulate} × {rows}", f"{cfg.loops.mean:.0f} ({cfg.loops.maximum})",
        with_gradient + (", recomputed" if cfg.checkpoint_loops else ""), f"{found['weights'] / 1e9:.1f}",
        f"{activations / 1e9:.1f}", f"**{(found['weights'] + activations) / 1e9:.1f}**",
        f"{cfg.batch_size * found['flops_a_row'] / 1e12:.1f}",
    ]  # fmt: skip


def markdown(results: dict[str, Any]) -> str:
    """The table, and the command of every recipe."""
    columns = ["recipe", "parameters, M (active)", "context, tokens", "micro-batches × rows", "loops: mean (max)",
               "loops with gradient", "weights and optimizer, GB", "activations, GB", "total, GB",
               "TFLOP per step"]  # fmt: skip
    lines = table(columns, (line(recipe, results[recipe.name]) for recipe in RECIPES), numbers=True)
    for recipe in RECIPES:
        lines += ["", f"**{recipe.name}.** {recipe.what}", "", "```", recipe.command, "```"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [recipe.name for recipe in RECIPES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="keep the last figures of the others")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "recipes.json")
    args = parser.parse_args()
    console = Console(stderr=True)
    results = json.loads(args.out.read_text())["results"] if args.out.is_file() else {}
    for recipe in RECIPES:
        if recipe.name in args.only:
            with console.status(recipe.name):
                results[recipe.name] = estimate(recipe)
    conditions = describe(torch.device("cpu"))
    args.out.write_text(json.dumps({"conditions": conditions, "results": results}, indent=1) + "\n")
    write(PAGE, markdown(results))
    print(f"{markdown(results)}\n\nResults: {args.out}; page: {PAGE}")


if __name__ == "__main__":
    main()
