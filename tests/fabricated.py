"""A run's directory as ``mythos train`` writes it, but without training: an untrained model and made-up metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers import tiny_model

from open_mythos import tasks
from open_mythos.evaluation import depth_grid
from open_mythos.evaluation.summary import Evaluation
from open_mythos.training import runs
from open_mythos.training.config import EvalConfig, LoopConfig, TaskConfig, TrainConfig

HALTING = {"exit": "gate:0.99", "saved": 0.25, "accuracy_fixed": 1.0, "accuracy_halting": 0.875}


def fabricate_run(path: Path, *, evaluated: bool = True, recipe: str = "parity", **changes: Any) -> TrainConfig:
    """Write a run to ``path`` and return its config; ``changes`` are fields of the model's config."""
    model = tiny_model(**{"vocab_size": 3, "max_seq_len": 128, **changes})
    cfg = TrainConfig(
        recipe=recipe,
        model=model.cfg,
        task=TaskConfig("parity", {}, 2, 8),
        loops=LoopConfig(maximum=4),
        evaluation=EvalConfig([8, 16], [1, 2, 4, 8], 8),
        steps=40,
    )
    cfg.save(path.mkdir(parents=True) or path / runs.RUN_CONFIG)
    runs.save_model(model, cfg, path)
    lines = [
        {"step": s, "loss": 2 / s, "accuracy": 1 - 1 / s, "loops": 3.0, "lr": 1e-3, "grad_norm": None, "skipped": 0}
        for s in range(10, 50, 10)
    ]
    (path / runs.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if evaluated:
        grid = depth_grid(
            model, tasks.load("parity"), cfg.evaluation.difficulties, cfg.evaluation.loops, examples=8, halting=False
        )
        Evaluation([grid], {"halting": HALTING}).save(path)
    return cfg
