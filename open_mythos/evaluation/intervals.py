"""95% confidence intervals of quantities between 0 and 1, over the last axis."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Z95 = 1.96
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""Two-sided quantiles of Student's t for 1, 2, ... degrees of freedom; the last, slightly wide, is used beyond."""


def normal_interval(values: Tensor) -> tuple[Tensor, Tensor]:
    """Normal interval of the mean of many values; (0, 1) for a single one."""
    return _around_mean(values, Z95)


def student_interval(values: Tensor) -> tuple[Tensor, Tensor]:
    """Student's t interval of the mean of few values, such as one per seed; (0, 1) for a single one."""
    return _around_mean(values, T95[min(values.shape[-1] - 1, len(T95)) - 1])


def _around_mean(values: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    n, mean = values.shape[-1], values.mean(-1)
    half_width = quantile * values.std(-1) / math.sqrt(n) if n > 1 else torch.ones_like(mean)
    return (mean - half_width).clamp(min=0), (mean + half_width).clamp(max=1)


def wilson_interval(share: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Interval of a proportion of ``n`` binary outcomes (Wilson 1927), valid near 0 and 1 too."""
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half_width = Z95 / (1 + Z95**2 / n) * (share * (1 - share) / n + Z95**2 / (4 * n**2)).sqrt()
    return (centre - half_width).clamp(min=0), (centre + half_width).clamp(max=1)
