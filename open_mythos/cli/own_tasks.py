"""``mythos eval`` on tasks of this library: accuracy over difficulty and loops, or bits for a byte of text."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from open_mythos import plots, tasks
from open_mythos.cli.console import console, picture, progress, table
from open_mythos.cli.measured import share, show_grid, show_halting, show_text
from open_mythos.config import MythosConfig
from open_mythos.evaluation.grid import combine
from open_mythos.evaluation.metrics import OVERTHINKING_FACTOR
from open_mythos.evaluation.summary import FILE, Evaluation, evaluate, n_steps
from open_mythos.evaluation.text import bits_per_byte
from open_mythos.model import OpenMythos
from open_mythos.nn.exits import Exit, parse
from open_mythos.tasks.text import Text
from open_mythos.training.config import TaskConfig, TrainConfig
from open_mythos.training.overrides import override
from open_mythos.training.runs import TRAINING_FILE, held_out_options, model_dir, training_config


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
        f"best: at the fewest loops that reach it to within .001. lost: best minus accuracy at {OVERTHINKING_FACTOR} times the "
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
