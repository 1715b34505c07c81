"""The latest evaluation of a run."""

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
    """The newer evaluation of training and of ``mythos eval`` (of text: bits per byte by loops), with its settings;
    computed now if there is none."""
    settings, loops = cfg.evaluation, cfg.depths
    directories = [path for path in {run, runs.evaluation_dir(run)} if (path / runs.EVALUATION).is_file()]
    for directory in sorted(directories, key=lambda path: (path / runs.EVALUATION).stat().st_mtime, reverse=True):
        evaluation = load_evaluation(directory)
        if directory == run:
            return evaluation, settings
        if isinstance(evaluation, Evaluation):
            if (evaluation.grids[0].task, evaluation.grids[0].options) == (task.name, task.to_dict()):
                return evaluation, settings
            continue
        data = json.loads((directory / runs.EVALUATION).read_text())
        if _same_text(data["options"], task.to_dict()) and data["exit"] is None:
            lengths = [int(length) for length in data["by_length"]]
            return evaluation, dataclasses.replace(settings, difficulties=lengths, examples=data["windows"])
    if isinstance(task, Text):
        return bits_per_byte(model, task, loops, settings.difficulties[0], settings.examples), settings
    return Evaluation([depth_grid(model, task, settings.difficulties, loops, settings.examples)], {}), settings


def _same_text(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether options name the same text, by any tokenizer path."""
    return one | {"tokenizer": ""} == other | {"tokenizer": ""}
