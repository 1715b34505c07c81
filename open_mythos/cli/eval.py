"""``mythos eval``: a checkpoint's accuracy over difficulty and loops, and what more depth does to it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from open_mythos import plots, tasks
from open_mythos.cli.console import clear_errors, console, picture, progress, table, whole_numbers
from open_mythos.cli.harness import eval_harness
from open_mythos.cli.measured import share, show_grid, show_halting, show_text
from open_mythos.config import MythosConfig
from open_mythos.evaluation.grid import combine
from open_mythos.evaluation.metrics import BEYOND
from open_mythos.evaluation.summary import FILE, Evaluation, evaluate, n_steps
from open_mythos.evaluation.text import bits_per_byte
from open_mythos.model import OpenMythos
from open_mythos.nn.exits import Exit, parse
from open_mythos.tasks.text import Text
from open_mythos.training.config import TaskConfig, TrainConfig
from open_mythos.training.overrides import override
from open_mythos.training.runs import (
    METRICS,
    TRAINING_FILE,
    evaluation_dir,
    held_out_options,
    load_model,
    model_dir,
    training_config,
)


def eval(
    checkpoint: Annotated[str, typer.Argument(help="A run, a model's directory, or the name of a shipped model.")],
    task: Annotated[str | None, typer.Option(help="Task; the one it was trained on if left out.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="Of the task, as key=value; may be repeated.")] = None,
    difficulties: Annotated[str | None, typer.Option(help="As in 24,96.")] = None,
    loops: Annotated[str | None, typer.Option(help="As in 1,2,4,8.")] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="Problems of a difficulty; documents of a task.")] = None,
    seeds: Annotated[str, typer.Option(help="Of the problems, as in 0,1,2.")] = "0",
    exit: Annotated[
        str | None,
        typer.Option(help="Let positions stop early: gate, change:0.03:2, acceleration, kl:5e-4, argmax:3."),
    ] = None,
    harness: Annotated[
        str | None, typer.Option(help="Tasks of the lm-evaluation-harness in place of ours, as in hellaswag,arc_easy.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Where the harness finds tasks of your own.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for table and picture.")] = None,
) -> None:
    """Accuracy over difficulty and loops, and what depth does."""
    with clear_errors():
        if harness is not None:
            only_ours = {"--task": task, "--option": option, "--difficulties": difficulties, "--exit": exit}
            eval_harness(checkpoint, harness, loops, examples, include_path, only_ours, out)
            return
        if include_path is not None:
            raise ValueError("--include-path is where --harness finds tasks; name one of them with --harness")
        model = load_model(checkpoint)
        cfg = settings(checkpoint, model.cfg, task, option or [], difficulties, loops, examples)
        made = tasks.load(cfg.task.name, **cfg.task.options)
        leave = None if exit is None else parse(exit)
        out = out or evaluation_dir(checkpoint)
        if isinstance(made, Text):
            path = eval_text(model, made, cfg, exit, out)
        else:
            path = eval_problems(model, made, cfg, whole_numbers("--seeds", seeds, "0,1,2"), leave, out)
    drawing = out / "grid.png"
    also = f"   picture: {drawing}" if drawing.is_file() else ""
    console.print(f"Everything: {path}{also}\n{next_step(checkpoint)}", highlight=False, soft_wrap=True)


# -- what to measure


def settings(
    checkpoint: str,
    model: MythosConfig,
    task: str | None,
    options: list[str],
    difficulties: str | None,
    loops: str | None,
    examples: int | None,
) -> TrainConfig:
    """The config that the checkpoint was trained with, its task and evaluation as asked for.

    Raises:
        ValueError: for a value that does not do, or if neither checkpoint nor user names a task.
    """
    known = task is None or (model_dir(checkpoint) / TRAINING_FILE).is_file()
    cfg = training_config(checkpoint) if known else TrainConfig(model=model)
    if task is not None and (not known or task != cfg.task.name):
        cfg = dataclasses.replace(cfg, task=TaskConfig(name=task))
    asked = {"difficulties": difficulties, "loops": loops, "examples": examples}
    changes = [f"evaluation.{name}={value}" for name, value in asked.items() if value is not None]
    if cfg.kind != "looped" and loops is None:
        changes.append(f"evaluation.loops={cfg.depths[0]}")  # a baseline has one
    held_out = held_out_options(checkpoint, cfg)
    changes += [f"task.options.{key}={value}" for key, value in held_out.items()]
    return override(cfg, [*changes, *(f"task.options.{option}" for option in options)])


def next_step(checkpoint: str) -> str:
    directory = model_dir(checkpoint)
    if (directory.parent / METRICS).is_file():
        return f"Next: a page with all of it, [bold]mythos report {directory.parent}[/bold]."
    return f"Next: look inside, [bold]mythos diagnose {directory}[/bold]."


# -- problems


def eval_problems(
    model: OpenMythos, task: tasks.Task, cfg: TrainConfig, seeds: list[int], exit: Exit | None, out: Path
) -> Path:
    asked = cfg.evaluation
    with progress(n_steps(asked.difficulties, seeds)) as begin:
        found = evaluate(model, task, asked.difficulties, asked.loops, asked.examples, seeds, exit, begin)
    path = found.save(out)
    trained = (cfg.task.max_difficulty, model.cfg.max_loop_iters) if cfg.task.name == task.name else None
    draw(found, out / "grid.png", trained)
    show_grid(found, cfg.task.max_difficulty if trained else 0, exit)
    show_metrics(found)
    show_halting(found)
    return path


def draw(found: Evaluation, path: Path, trained: tuple[int, int] | None) -> None:
    """The picture, if matplotlib is there."""
    grid, mean = found.grids[0], combine(found.grids)["accuracy"].mean
    picture(lambda: plots.accuracy_grid(mean, grid.difficulties, grid.loops, path, grid.unit, grid.chance, trained))


def show_metrics(found: Evaluation) -> None:
    grid = found.grids[0]
    shown = table("what depth does", grid.unit, "best", "95%", "loops", "exact", "lost", "settled", "zeros", "noise")
    for i, measured in enumerate(found.metrics["difficulties"]):
        j = grid.loops.index(measured["best_loops"])
        low, high, exact = (share(float(x[i, j])) for x in (grid.low, grid.high, grid.exact))
        settled, starts = measured["settle_rate"], measured["from_start"]
        shown.add_row(
            str(measured["difficulty"]), share(measured["best"]), f"{low}-{high}", str(measured["best_loops"]), exact,
            share(measured["damage"]), "-" if settled is None else share(settled),
            *(share(starts[start]["differing"]) for start in ("zeros", "noise")),
        )  # fmt: skip
    console.print(shown)
    trained = found.metrics["trained_loops"]
    console.print(
        f"best: at the fewest loops that reach it to within .001. lost: best minus accuracy at {BEYOND} times the "
        f"{trained} trained loops, or the deepest here. settled: positions whose state moves by less than 1% in loop "
        f"{grid.loops[-1]}. zeros, noise: answers that differ there if the loop starts from these.",
        style="dim", highlight=False,
    )  # fmt: skip


# -- text


def eval_text(model: OpenMythos, task: Text, cfg: TrainConfig, exit: str | None, out: Path) -> Path:
    asked, leave = cfg.evaluation, None if exit is None else parse(exit)
    with progress(len(asked.difficulties)) as begin:
        found = {}
        for length in asked.difficulties:
            begin(f"{length} {task.unit}")
            found[length] = bits_per_byte(model, task, asked.loops, length, asked.examples, leave)
    path = out / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    # As in a run's own evaluation.json, which has the first length alone; then all of them.
    data = {"bits_per_byte": next(iter(found.values())), "by_length": found, "windows": asked.examples}
    path.write_text(json.dumps(data | {"task": task.name, "options": task.to_dict(), "exit": exit}, indent=1) + "\n")
    show_text(found)
    return path
