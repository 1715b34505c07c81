"""Sampling of the number of loops of a training step, per batch or per sequence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from open_mythos.training.config import LoopConfig


def draw_loops(cfg: LoopConfig, progress: float, n: int, length: int, generator: torch.Generator) -> Tensor:
    """Loop counts of a batch of ``n`` sequences of ``length`` tokens, (n,) int64; all equal if ``cfg.per`` is "batch".

    ``progress`` is the completed share of the run, 0 to 1; ``generator`` is on the CPU.
    """
    shape = (n if cfg.per == "sequence" else 1,)
    low, high = cfg.minimum, cfg.maximum
    if cfg.schedule == "fixed":
        drawn = torch.full(shape, cfg.mean).round()
    elif cfg.schedule == "by_length":
        drawn = torch.full(shape, math.ceil(length * cfg.per_token))
    elif cfg.schedule == "poisson":
        drawn = torch.poisson(torch.full(shape, cfg.mean), generator=generator)
    elif cfg.schedule == "lognormal":
        noise = torch.randn(shape, generator=generator)
        rate = cfg.mean * (cfg.sigma * noise - cfg.sigma**2 / 2).exp()  # log-normal with mean cfg.mean
        drawn = torch.poisson(rate, generator=generator)
    else:
        if cfg.schedule == "curriculum":
            high = low + round((high - low) * min(1.0, progress / cfg.ramp))
        drawn = torch.randint(low, high + 1, shape, generator=generator)
    return drawn.clamp(low, high).to(torch.int64).expand(n)
