"""A run that takes a fraction of a second and covers most features."""

from __future__ import annotations

from typing import Any

import torch._dynamo  # noqa: F401  optimizers import it, in two seconds; forked processes share this import
from helpers import TINY

from open_mythos.config import MythosConfig
from open_mythos.training.config import (
    EvalConfig,
    GateConfig,
    LoopConfig,
    LossConfig,
    OptimConfig,
    TaskConfig,
    TrainConfig,
)
from open_mythos.training.overrides import override


def tiny_run(*overrides: str, **changes: Any) -> TrainConfig:
    """12 steps of parity on a model with experts, LoRA, prelude and coda."""
    cfg = TrainConfig(
        model=MythosConfig(attn_type="gqa", **{**TINY, "vocab_size": 3, "dim": 16, "halting": False}),
        task=TaskConfig("parity", {}, 2, 6),
        loops=LoopConfig("uniform", minimum=1, maximum=3, gradient="last", grad_loops=2, stale=0.5),
        loss=LossConfig(),
        optim=OptimConfig(lr=1e-3, warmup=2),
        gate=GateConfig(steps=0),
        evaluation=EvalConfig([4], [1, 2], 4),
        steps=12,
        batch_size=8,
        log_every=1,
        save_every=4,
        **changes,
    )
    return override(cfg, overrides)
