"""``mythos eval``: a checkpoint's accuracy over difficulty and loops, and what more depth does to it."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text as RichText

from open_mythos import plots, tasks
from open_mythos.cli.console import clear_errors, console, progress, si, table
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
from open_mythos.training.runs import METRICS, TRAINING_FILE, home_dir, load_model, model_dir, training_config

SHALLOW, DEEP = 8, 32
"""Loops between which a text model is asked to stay as good as it was."""


def eval(
    checkpoint: Annotated[str, typer.Argument(help="A run, a model's directory, or the name of a shipped model.")],
    task: Annotated[str | None, typer.Option(help="Task; the one it was trained on if left out.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="Of the task, as key=value; may be repeated.")] = None,
    difficulties: Annotated[str | None, typer.Option(help="As in 24,96.")] = None,
    loops: Annotated[str | None, typer.Option(help="As in 1,2,4,8.")] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="Problems of each difficulty.")] = None,
    seeds: Annotated[str, typer.Option(help="Of the problems, as in 0,1,2.")] = "0",
    exit: Annotated[
        str | None,
        typer.Option(help="Let positions stop early: gate, change:0.03:2, acceleration, kl:5e-4, argmax:3."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for table and picture.")] = None,
) -> None:
    """Accuracy over difficulty and loops, and what depth does."""
    with clear_errors():
        model = load_model(checkpoint)
        cfg = settings(checkpoint, model.cfg, task, option or [], difficulties, loops, examples)
        made = tasks.load(cfg.task.name, **cfg.task.options)
        leave = None if exit is None else parse(exit)
        out = out or default_directory(checkpoint)
        if isinstance(made, Text):
            path = eval_text(model, made, cfg, leave, out)
        else:
            path = eval_problems(model, made, cfg, as_seeds(seeds), leave, out)
    picture = out / "grid.png"
    also = f"   picture: {picture}" if picture.is_file() else ""
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
        changes.append(f"evaluation.loops={model.max_loop_iters}")  # a baseline has one depth
    if cfg.task.name == Text.name:
        changes.append("task.options.split=held_out")
    return override(cfg, [*changes, *(f"task.options.{option}" for option in options)])


def as_seeds(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--seeds {text!r} should be whole numbers with commas between, as in 0,1,2") from error


def default_directory(checkpoint: str) -> Path:
    """``evaluation`` inside the run or the model's directory; in ``runs`` if that is not ours to write to."""
    home = home_dir(model_dir(checkpoint))
    if Path(checkpoint).exists() and os.access(home, os.W_OK):
        return home / "evaluation"
    return Path("runs") / f"eval-{Path(checkpoint).name}"


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
    show_grid(found, exit)
    show_metrics(found)
    show_halting(found)
    return path


def draw(found: Evaluation, path: Path, trained: tuple[int, int] | None) -> None:
    """The picture, if matplotlib is there."""
    grid, mean = found.grids[0], combine(found.grids)["accuracy"].mean
    try:
        plots.require_matplotlib()
    except ImportError as error:
        console.print(f"no picture: {error}", markup=False)
        return
    plots.accuracy_grid(mean, grid.difficulties, grid.loops, path, grid.unit, grid.chance, trained)


def show_grid(found: Evaluation, exit: Exit | None) -> None:
    grid, mean = found.grids[0], combine(found.grids)["accuracy"].mean
    state = "none stops early" if exit is None else f"exit {exit}"
    n_problems = grid.examples * len(found.grids)
    shown = table(f"{grid.task}: accuracy by loops, {state}, {n_problems} problems a row", grid.unit)
    for count in grid.loops:
        shown.add_column(str(count), justify="right")
    for difficulty, row in zip(grid.difficulties, mean.tolist(), strict=True):
        best = row.index(max(row))
        cells = [RichText(share(accuracy), "bold" if i == best else "") for i, accuracy in enumerate(row)]
        shown.add_row(str(difficulty), *cells)
    console.print(shown)
    if exit is not None:
        used = zip(grid.difficulties, grid.loops_used[:, -1].tolist(), strict=True)
        ran = ", ".join(f"{n:.1f} with {difficulty} {grid.unit}" for difficulty, n in used)
        console.print(f"loops that a position ran, of {grid.loops[-1]}: {ran}", style="dim", highlight=False)


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


def show_halting(found: Evaluation) -> None:
    """What halting saves, and accuracy at equal operations; nothing for a model that does not halt."""
    halting, matched = found.metrics["halting"], found.metrics["compute_matched"]
    if halting is None:
        return
    shown = table("difficulties mixed in one batch", "", "accuracy", "loops")
    shown.add_row("fixed count", share(halting["accuracy_fixed"]), f"{halting['loops_fixed']:.1f}")
    shown.add_row("halting", share(halting["accuracy_halting"]), f"{halting['loops_halting']:.1f}")
    shown.add_row("saved", "", f"{halting['saved']:.0%}")
    console.print(shown)
    title = f"at equal operations, {matched['difficulty']} {found.grids[0].unit}"
    shown = table(title, "act_threshold", "loops", "a token", "halting", "fixed count")
    for threshold, curve in matched["halting"].items():
        point: dict[str, Any] = curve[-1]
        cost = si(point["flops"], "FLOP")
        shown.add_row(
            threshold, f"{point['loops']:.1f}", cost, share(point["accuracy"]), share(point["fixed_accuracy"])
        )
    console.print(shown)


def share(x: float) -> str:
    """A share in four characters: ``.731``, ``1.00``."""
    return f"{x:.3f}".removeprefix("0")[:4]


# -- text


def eval_text(model: OpenMythos, task: Text, cfg: TrainConfig, exit: Exit | None, out: Path) -> Path:
    asked = cfg.evaluation
    with progress(len(asked.difficulties)) as begin:
        found = {}
        for length in asked.difficulties:
            begin(f"{length} {task.unit}")
            found[length] = bits_per_byte(model, task, asked.loops, length, asked.examples, exit)
    path = out / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    # As in a run's own evaluation.json, which has the first length alone; then all of them.
    data = {"bits_per_byte": next(iter(found.values())), "by_length": found, "windows": asked.examples}
    path.write_text(json.dumps(data | {"task": task.name, "options": task.to_dict()}, indent=1) + "\n")
    show_text(found)
    return path


def show_text(found: dict[int, dict[int, float]]) -> None:
    """A column for each length; the least bits bold."""
    shown = table("bits per byte of held-out text", "loops", *(f"{length} tokens" for length in found))
    curves = list(found.values())
    for n in curves[0]:
        cells = ((curve[n], "bold" if curve[n] == min(curve.values()) else "") for curve in curves)
        shown.add_row(str(n), *(RichText(f"{bits:.4f}", style) for bits, style in cells))
    if {SHALLOW, DEEP} <= curves[0].keys():
        shown.add_section()
        changes = (curve[DEEP] / curve[SHALLOW] - 1 for curve in curves)
        shown.add_row(f"from {SHALLOW} to {DEEP}", *(f"{change:+.2%}" for change in changes))
    console.print(shown)
