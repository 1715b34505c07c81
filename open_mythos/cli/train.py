"""``mythos train``: train from a recipe, list recipes, or estimate the cost of a run."""

from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from open_mythos.cli.console import console, mythos, note, progress, si, table, typed
from open_mythos.training.config import TrainConfig


def train(
    recipe: Annotated[str | None, typer.Argument(help="Name of a recipe; see --list.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings such as steps=500 optim.lr=3e-4.")
    ] = None,
    out: Annotated[Path | None, typer.Option(file_okay=False, help="Output directory; default: runs/RECIPE.")] = None,
    resume: Annotated[
        str,
        typer.Option(help="auto: from the newest checkpoint, if there is one; or never; or the path of a checkpoint."),
    ] = "never",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cost of the run and exit.")] = False,
    show_list: Annotated[bool, typer.Option("--list", help="Print the recipes and exit.")] = False,
) -> None:
    """Train and evaluate a model from a recipe."""
    from open_mythos.cli.own_tasks import show_grid, show_halting, show_text
    from open_mythos.cli.owned import may_replace_run
    from open_mythos.cli.watch import reading, watching
    from open_mythos.training import distributed
    from open_mythos.training.fit import fit, load_evaluation
    from open_mythos.training.recipes import RECIPES, configured

    if show_list or recipe is None:
        rows = ((name, (made_by.__doc__ or "").partition("\n")[0]) for name, made_by in RECIPES.items())
        console.print(table("recipes", "recipe", "description", rows=rows, left="description"))
        note(f"Next: {mythos('train', 'debug')}, or any of these with --dry-run to see its cost.")
        return
    run = out or Path("runs") / recipe
    with distributed.processes():
        with distributed.first_process_first(), reading(overrides or []):
            cfg = configured(recipe, overrides or [])
        if dry_run:
            show_cost(cfg)
            options = [*(["--out", out] if out else []), *(["--resume", resume] if resume != "never" else [])]
            note(f"Nothing was written. Next: {mythos('train', recipe, *(overrides or []), *options)}.")
            return
        may_replace_run(run)
        again = typed("train", recipe, *(overrides or []), "--out", run, "--resume", "auto")
        if (n := distributed.world_size()) > 1:
            again = again.replace("mythos", f"torchrun --nproc-per-node {n} -m open_mythos", 1)
        with watching(cfg, again) as watch:
            fit(cfg, run, resume, watch)
        if distributed.rank() > 0:
            return
        scores = load_evaluation(run)
        if isinstance(scores, dict):
            show_text({cfg.evaluation.difficulties[0]: scores})
        else:
            show_grid(scores, cfg.task.max_difficulty)
            show_halting(scores)
    chat = f" Chat with it: {mythos('chat', run)}." if cfg.task.name == "text" else ""
    note(
        f"Model: {run / 'model'}   metrics: {run / 'metrics.jsonl'}   evaluation: {run / 'evaluation.json'}",
        f"Next: evaluate it with {mythos('eval', run)}, or write an HTML report with {mythos('report', run)}.{chat}",
    )


def show_cost(cfg: TrainConfig) -> None:
    from open_mythos.training.cost import run_cost
    from open_mythos.training.fit import stages

    with progress(3 + stages(cfg)) as begin:
        cost = run_cost(cfg, begin)
    seconds = cost.seconds_per_step
    total = seconds * cfg.steps + cost.gate_seconds + cost.evaluation_seconds

    def span(seconds: float) -> str:
        return str(timedelta(seconds=round(seconds)))

    rows = (
        ("parameters", f"{cost.parameters:,}", "counted"),
        ("FLOPs per step", si(cost.flops_per_step), "matrix products, at the mean number of loops"),
        ("memory of the weights", si(cost.weight_bytes, "B"), "weights, gradients, optimizer state, EMA"),
        (
            "memory of activations",
            si(cost.activation_bytes, "B"),
            "saved for the backward pass; peak of the trial steps",
        ),
        ("time per step", f"{seconds:.3g} s", f"mean of {cost.trial_steps} trial steps"),
        ("time of training", span(seconds * cfg.steps), f"{cfg.steps:,} steps"),
        ("time of the halting gate", span(cost.gate_seconds), "extrapolated; gate.steps=0: none"),
        (
            "time of evaluation",
            span(cost.evaluation_seconds),
            "extrapolated; evaluation.loops=1,8 makes it quick",
        ),
        ("time of the run", span(total), "training, gate and evaluation"),
    )
    console.print(table(f"{cfg.recipe}: cost of a run", "quantity", "value", "method", rows=rows, left="method"))
