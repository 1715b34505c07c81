"""``mythos eval`` on tasks of this library: accuracy over difficulty and loops, or bits per byte of text."""

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
from open_mythos.nn.exits import parse
from open_mythos.tasks.text import Text
from open_mythos.training.config import TaskConfig, TrainConfig
from open_mythos.training.overrides import override
from open_mythos.training.runs import TRAINING_FILE, held_out_options, model_dir, training_config


def settings(
    checkpoint: str, model: MythosConfig, task: str | None, options: list[str], difficulties: str | None,
    loops: str | None, examples: int | None,
) -> TrainConfig:  # fmt: skip
    """The config of the checkpoint's training, with task and evaluation overridden."""
    has_config = task is None or (model_dir(checkpoint) / TRAINING_FILE).is_file()
    cfg = training_config(checkpoint) if has_config else TrainConfig(model=model)
    if task is not None and (not has_config or task != cfg.task.name):
        cfg = dataclasses.replace(cfg, task=TaskConfig(name=task))
    requested = {"difficulties": difficulties, "loops": loops, "examples": examples}
    changes = [f"evaluation.{name}={value}" for name, value in requested.items() if value is not None]
    if cfg.kind != "looped" and loops is None:
        changes.append(f"evaluation.loops={cfg.depths[0]}")  # a baseline has one depth
    changes += [f"task.options.{key}={value}" for key, value in held_out_options(checkpoint, cfg).items()]
    return override(cfg, [*changes, *(f"task.options.{option}" for option in options)])


def eval_problems(
    model: OpenMythos, task: tasks.Task, cfg: TrainConfig, seeds: list[int], exit: str | None, out: Path
) -> Path:
    """Evaluate, write ``evaluation.json`` and, with matplotlib, a plot, and show tables."""
    settings, rule = cfg.evaluation, None if exit is None else parse(exit)
    with progress(n_steps(settings.difficulties, seeds)) as begin:
        result = evaluate(model, task, settings.difficulties, settings.loops, settings.examples, seeds, rule, begin)
    path, grid, mean = result.save(out), result.grids[0], combine(result.grids)["accuracy"].mean
    axes = grid.difficulties, grid.loops, out / "grid.png", grid.unit, grid.chance
    trained = (cfg.task.max_difficulty, model.cfg.max_loop_iters) if cfg.task.name == task.name else None
    picture(lambda: plots.accuracy_grid(mean, *axes, trained))
    show_grid(result, cfg.task.max_difficulty if trained else 0, rule)
    show_metrics(result)
    show_halting(result)
    return path


def show_metrics(evaluation: Evaluation) -> None:
    grid = evaluation.grids[0]
    rows = table("metrics of depth", grid.unit, "best", "95%", "loops", "exact", "drop", "converged", "zeros", "noise")
    for i, metrics in enumerate(evaluation.metrics["difficulties"]):
        j = grid.loops.index(metrics["best_loops"])
        low, high, exact = (share(float(x[i, j])) for x in (grid.low, grid.high, grid.exact))
        converged, starts = metrics["settle_rate"], metrics["from_start"]
        rows.add_row(
            str(metrics["difficulty"]), share(metrics["best"]), f"{low}-{high}", str(metrics["best_loops"]), exact,
            share(metrics["damage"]), "-" if converged is None else share(converged),
            *(share(starts[start]["differing"]) for start in ("zeros", "noise")),
        )  # fmt: skip
    console.print(rows)
    trained = evaluation.metrics["trained_loops"]
    console.print(
        f"best: at the minimum loops within .001 of it. drop: best minus accuracy at {OVERTHINKING_FACTOR} times the "
        f"{trained} trained loops, or the deepest here. converged: positions whose state changes by less than 1% in "
        f"loop {grid.loops[-1]}. zeros, noise: answers that differ there if the loop starts from these.",
        style="dim", highlight=False,
    )  # fmt: skip


def eval_text(model: OpenMythos, task: Text, cfg: TrainConfig, exit: str | None, out: Path) -> Path:
    """Bits per byte at each length and loop count, written to ``evaluation.json`` and shown."""
    settings, rule = cfg.evaluation, None if exit is None else parse(exit)
    bits = {}
    with progress(len(settings.difficulties)) as begin:
        for length in settings.difficulties:
            begin(f"{length} {task.unit}")
            bits[length] = bits_per_byte(model, task, settings.loops, length, settings.examples, rule)
    path = out / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    # "bits_per_byte", of the first length, is as in the evaluation.json of training
    data = {"bits_per_byte": next(iter(bits.values())), "by_length": bits, "windows": settings.examples}
    path.write_text(json.dumps(data | {"task": task.name, "options": task.to_dict(), "exit": exit}, indent=1) + "\n")
    show_text(bits)
    return path
