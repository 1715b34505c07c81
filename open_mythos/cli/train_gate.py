"""``mythos train-gate``: train the halting gate of a trained model."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from open_mythos.cli.console import console, mythos, note, progress, table, typed
from open_mythos.fields import MAX_SEED, must
from open_mythos.training.config import GateConfig, TrainConfig


def train_gate(
    checkpoint: Annotated[str, typer.Argument(help="A run, a model's directory, or the name of a shipped model.")],
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; default: the run's config.")] = None,
    min_difficulty: Annotated[int | None, typer.Option(help="Of the problems; default: as in training.")] = None,
    max_difficulty: Annotated[
        int | None,
        typer.Option(help="Of the problems; may exceed the model's own training; default: the run's config."),
    ] = None,
    loops: Annotated[
        int | None,
        typer.Option(min=1, help="Number of loops that solves the hardest problems; default: the run's config."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed for the problems.")] = 0,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Output directory; default: NAME-gate next to the model.")
    ] = None,
) -> None:
    """Train the halting gate of a trained model, with all other weights frozen."""
    import torch

    from open_mythos import files, tasks
    from open_mythos.cli.owned import may_replace_model
    from open_mythos.cli.watch import log
    from open_mythos.models import TRAINING_FILE, home_dir, load_model, model_dir, save_model
    from open_mythos.training.gate import ROUNDS
    from open_mythos.training.gate import train_gate as run_training
    from open_mythos.training.owner import owned
    from open_mythos.training.runs import own_tokens, training_config
    from open_mythos.training.stopping import Stop

    trained = training_config(checkpoint)
    cfg = settings(trained, steps, min_difficulty, max_difficulty, loops)
    model = load_model(checkpoint)
    home = files.real(home_dir(checkpoint))
    beside = home.with_name(f"{home.name}-gate") if Path(checkpoint).exists() else Path(f"runs/{checkpoint}-gate")
    out = out or beside
    is_model = files.real(out) == files.real(model_dir(checkpoint))
    must(not is_model, f"--out {out} is the model itself, which is not overwritten; give another directory")
    may_replace_model(out, is_agreed=files.real(out) == files.real(beside))
    task = tasks.load(cfg.task.name, **cfg.task.options | own_tokens(cfg.task.name, model_dir(checkpoint)))
    easiest, hardest = cfg.task.min_difficulty, cfg.task.max_difficulty
    given = {"steps": steps, "min-difficulty": min_difficulty, "max-difficulty": max_difficulty, "loops": loops}
    options = [word for name, n in given.items() if n is not None for word in (f"--{name}", n)]
    again = typed("train-gate", checkpoint, *options, "--seed", seed, "--out", out)
    saved = False

    def left() -> str:
        return f"{out} is saved" if saved else f"nothing was saved; start again with {again}"

    with Stop() as stop, owned(out, log), stop.telling(log, left):
        with progress(n_steps=ROUNDS + 2) as begin:
            generator = torch.Generator().manual_seed(seed)
            scores = run_training(model, task, cfg.gate, easiest, hardest, generator, begin)
        with stop.held():
            save_model(model, out, checkpoint)
            dataclasses.replace(trained, gate=cfg.gate).save(out / TRAINING_FILE)
            saved = True
    labels = {"fixed": "every loop", "halting": "halting gate"}
    rows = ((labels[k], f"{scores[f'accuracy_{k}']:.4f}", f"{scores[f'loops_{k}']:.1f}") for k in labels)
    title = f"new problems of {easiest} to {hardest} {task.unit}, mixed"
    console.print(table(title, "", "accuracy", "loops used", rows=rows))
    console.print(f"The gate saves {1 - scores['loops_halting'] / scores['loops_fixed']:.0%} of the loops.")
    note(
        f"Model: {out}; the original is unchanged.",
        f"Next: evaluate it at every depth with {mythos('eval', out)}.",
    )


def settings(
    cfg: TrainConfig, steps: int | None, min_difficulty: int | None, max_difficulty: int | None, loops: int | None
) -> TrainConfig:
    """``cfg`` with the given options of the gate and the task."""
    if cfg.kind != "looped":
        raise ValueError(f"this is a baseline (kind={cfg.kind!r}), whose depth is fixed; give a looped model")
    low = cfg.task.min_difficulty if min_difficulty is None else min_difficulty
    high = max(low, cfg.hardest_for_gate) if max_difficulty is None else max_difficulty
    n_steps, n_loops = steps or cfg.gate.steps or GateConfig().steps, loops or cfg.gate.loops
    gate = dataclasses.replace(cfg.gate, steps=n_steps, loops=n_loops, max_difficulty=max(0, high))
    task = dataclasses.replace(cfg.task, min_difficulty=low, max_difficulty=high)
    return dataclasses.replace(cfg, gate=gate, task=task)
