"""``mythos train``: train by a recipe, or see what there is, or what it would cost."""

from __future__ import annotations

import shlex
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from open_mythos.cli.console import clear_errors, console, fail, si, table
from open_mythos.training.config import TrainConfig


def train(
    recipe: Annotated[str | None, typer.Argument(help="Name of a recipe; see --list.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as steps=500 optim.lr=3e-4.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the run; runs/RECIPE if left out.")] = None,
    resume: Annotated[
        str, typer.Option(help="auto: go on from the newest checkpoint. Or never, or the path of a checkpoint.")
    ] = "never",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what the run would cost, and stop.")] = False,
    show_list: Annotated[bool, typer.Option("--list", help="Print the recipes, and stop.")] = False,
) -> None:
    """Train a model by a recipe, and measure it."""
    from open_mythos.cli.watch import reading, watching
    from open_mythos.training import distributed
    from open_mythos.training.fit import fit
    from open_mythos.training.recipes import configured
    from open_mythos.training.trainer import TrainingError

    if show_list or recipe is None:
        show_recipes()
        return
    run = out or Path("runs") / recipe
    with clear_errors(), distributed.processes():
        with distributed.first_process_first(), reading(overrides or []):
            cfg = configured(recipe, overrides or [])
        if dry_run:
            show_cost(cfg)
            words = [recipe, *(overrides or []), *(["--out", str(out)] if out else [])]
            console.print(
                f"Nothing was written. Next: [bold]mythos train {escape(shlex.join(words))}[/bold].",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
            return
        try:
            with watching(cfg.steps) as watch:
                fit(cfg, run, resume, watch)
        except TrainingError as error:
            fail(str(error))
        except KeyboardInterrupt:
            fail(f"stopped; go on with the same command and --resume auto --out {run}")
        if distributed.rank() > 0:
            return
        show_evaluation(cfg, run)
    console.print(
        f"Model: {run / 'model'}   metrics: {run / 'metrics.jsonl'}   evaluation: {run / 'evaluation.json'}\n"
        f"Next: measure it with [bold]mythos eval {escape(str(run))}[/bold], "
        f"or read about it with [bold]mythos report {escape(str(run))}[/bold]."
        + (f" Talk to it: [bold]mythos chat {escape(str(run))}[/bold]." if cfg.task.name == "text" else ""),
        highlight=False, soft_wrap=True,
    )  # fmt: skip


# -- before


def show_recipes() -> None:
    from open_mythos.training.recipes import RECIPES

    shown = table("recipes", "recipe", "what it trains")
    shown.columns[1].justify = "left"
    for name, made in RECIPES.items():
        shown.add_row(name, (made.__doc__ or "").partition("\n")[0])
    console.print(shown)
    console.print("Next: [bold]mythos train debug[/bold], or any of these with --dry-run to see its cost.")


def show_cost(cfg: TrainConfig) -> None:
    from open_mythos.training.cost import run_cost

    cost = run_cost(cfg)
    shown = table(f"{cfg.recipe}: what a run costs", "quantity", "value", "how it is found")
    shown.columns[2].justify = "left"
    seconds = cost.seconds_per_step
    for label, value, how in (
        ("parameters", f"{cost.parameters:,}", "counted"),
        ("FLOPs per step", si(cost.flops_per_step), "matrix products, at the mean number of loops"),
        ("memory of the weights", si(cost.weight_bytes, "B"), "weights, gradients, optimizer's state, average"),
        (
            "memory of activations",
            si(cost.activation_bytes, "B"),
            "kept for the backward pass; most of the trial steps",
        ),
        ("time per step", f"{seconds:.3g} s", f"mean of {cost.trial_steps} trial steps"),
        ("time of the run", str(timedelta(seconds=round(seconds * cfg.steps))), f"{cfg.steps:,} steps, no evaluation"),
    ):
        shown.add_row(label, value, how)
    console.print(shown)


# -- after


def show_evaluation(cfg: TrainConfig, run: Path) -> None:
    from open_mythos.cli.measured import show_grid, show_halting, show_text
    from open_mythos.training.fit import load_evaluation

    found = load_evaluation(run)
    if isinstance(found, dict):
        show_text({cfg.evaluation.difficulties[0]: found})
        return
    show_grid(found, cfg.task.max_difficulty)
    show_halting(found)
