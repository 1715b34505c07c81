"""What was measured of a run last, wherever it lies."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from open_mythos import tasks
from open_mythos.evaluation import depth_grid
from open_mythos.evaluation.summary import Evaluation
from open_mythos.evaluation.text import bits_per_byte
from open_mythos.model import OpenMythos
from open_mythos.tasks.text import Text
from open_mythos.training import runs
from open_mythos.training.config import EvalConfig, TrainConfig
from open_mythos.training.fit import load_evaluation


def last_evaluation(
    run: Path, cfg: TrainConfig, model: OpenMythos, task: tasks.Task
) -> tuple[Evaluation | dict[int, float], EvalConfig]:
    """What was measured last, when training ended or by ``mythos eval``, or else is now; of text, bits per byte by
    loops. With it, the settings by which text was measured."""
    asked, loops = cfg.evaluation, cfg.depths
    places = {place for place in (run, runs.evaluation_dir(run)) if (place / runs.EVALUATION).is_file()}
    for place in sorted(places, key=lambda place: (place / runs.EVALUATION).stat().st_mtime, reverse=True):
        found = load_evaluation(place)
        if isinstance(found, Evaluation):
            if place == run or (found.grids[0].task, found.grids[0].options) == (task.name, task.to_dict()):
                return found, asked
            continue
        data = json.loads((place / runs.EVALUATION).read_text())
        if place == run:
            return found, asked
        if _same_text(data["options"], task.to_dict()) and data["exit"] is None:
            lengths = [int(length) for length in data["by_length"]]
            return found, dataclasses.replace(asked, difficulties=lengths, examples=data["windows"])
    if isinstance(task, Text):
        return bits_per_byte(model, task, loops, asked.difficulties[0], asked.examples), asked
    return Evaluation([depth_grid(model, task, asked.difficulties, loops, asked.examples)], {}), asked


def _same_text(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether options name the same text; the model's own tokenizer may be named by several paths."""
    return one | {"tokenizer": ""} == other | {"tokenizer": ""}
