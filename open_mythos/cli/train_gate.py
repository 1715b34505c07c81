"""``mythos train-gate``: teach a finished model when each position may stop."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from open_mythos.cli.console import clear_errors, console, progress, table
from open_mythos.training.config import GateConfig, TrainConfig


def train_gate(
    checkpoint: Annotated[str, typer.Argument(help="A run, a model's directory, or the name of a shipped model.")],
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the gate; as the run's config says.")] = None,
    min_difficulty: Annotated[int | None, typer.Option(help="Easiest problems; as in training.")] = None,
    max_difficulty: Annotated[
        int | None,
        typer.Option(help="Hardest problems, which may be harder than the model's; as the run's config says."),
    ] = None,
    loops: Annotated[
        int | None, typer.Option(min=1, help="Loops that solve the hardest; as the run's config says.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the problems.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Directory for the model; NAME-gate beside it.")] = None,
) -> None:
    """Teach a trained model when to stop, and leave it as it is otherwise."""
    import torch

    from open_mythos import tasks
    from open_mythos.models import TRAINING_FILE, load_model, model_dir, save_model
    from open_mythos.training.gate import ROUNDS
    from open_mythos.training.gate import train_gate as teach
    from open_mythos.training.runs import training_config

    with clear_errors():
        trained = training_config(checkpoint)
        cfg = settings(trained, steps, min_difficulty, max_difficulty, loops)
        model = load_model(checkpoint)
        out = out or beside(checkpoint)
        if out.resolve() == model_dir(checkpoint).resolve():
            raise ValueError(f"--out {out} is the model itself, which stays as it is; name another directory")
        task = tasks.load(cfg.task.name, **cfg.task.options)
        easiest, hardest = cfg.task.min_difficulty, cfg.task.max_difficulty
        with progress(n_steps=ROUNDS + 2) as begin:
            generator = torch.Generator().manual_seed(seed)
            found = teach(model, task, cfg.gate, easiest, hardest, generator, begin)
        save_model(model, out, checkpoint)
        dataclasses.replace(trained, gate=cfg.gate).save(out / TRAINING_FILE)
    show(found, f"{easiest} to {hardest} {task.unit}")
    console.print(
        f"Model: {out}; the one it comes from is unchanged.\n"
        f"Next: measure it at every depth with [bold]mythos eval {escape(str(out))}[/bold].",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def settings(
    cfg: TrainConfig, steps: int | None, min_difficulty: int | None, max_difficulty: int | None, loops: int | None
) -> TrainConfig:
    """``cfg`` with what was asked for in its place.

    Raises:
        ValueError: for values that do not do, or a baseline, which has one depth.
    """
    if cfg.kind != "looped":
        raise ValueError(f"this is a baseline (kind={cfg.kind!r}), whose depth cannot be chosen; give a looped model")
    low = cfg.task.min_difficulty if min_difficulty is None else min_difficulty
    high = max(low, cfg.hardest_for_gate) if max_difficulty is None else max_difficulty
    gate = {
        "steps": steps or cfg.gate.steps or GateConfig().steps,
        "loops": loops or cfg.gate.loops,
        "max_difficulty": max(0, high),
    }
    task = dataclasses.replace(cfg.task, min_difficulty=low, max_difficulty=high)
    return dataclasses.replace(cfg, gate=dataclasses.replace(cfg.gate, **gate), task=task)


def beside(checkpoint: str) -> Path:
    """``NAME-gate`` next to the run or the model's directory; in ``runs`` for a shipped model."""
    from open_mythos.models import home_dir, model_dir

    if not Path(checkpoint).exists():
        return Path("runs") / f"{checkpoint}-gate"
    home = home_dir(model_dir(checkpoint).resolve())
    return home.with_name(f"{home.name}-gate")


def show(found: dict[str, float], problems: str) -> None:
    shown = table(f"new problems of {problems}, mixed", "", "accuracy", "loops used")
    for label, key in (("every loop", "fixed"), ("the gate decides", "halting")):
        shown.add_row(label, f"{found[f'accuracy_{key}']:.4f}", f"{found[f'loops_{key}']:.1f}")
    console.print(shown)
    console.print(f"The gate leaves out {1 - found['loops_halting'] / found['loops_fixed']:.0%} of the loops.")
