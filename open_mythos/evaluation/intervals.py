"""How far to trust a mean: 95% intervals of quantities between 0 and 1, over the last axis."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Z95 = 1.96
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""Student's t for 1, 2, ... degrees of freedom, two-sided; the last, slightly wide, serves beyond."""


def normal_interval(values: Tensor) -> tuple[Tensor, Tensor]:
    """Of the mean of many numbers, from their spread. Of one number: from 0 to 1."""
    return _around_mean(values, Z95)


def student_interval(values: Tensor) -> tuple[Tensor, Tensor]:
    """Of the mean of few numbers, such as one for each seed. Of one number: from 0 to 1."""
    return _around_mean(values, T95[min(values.shape[-1] - 1, len(T95)) - 1])


def _around_mean(values: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    n, mean = values.shape[-1], values.mean(-1)
    reach = quantile * values.std(-1) / math.sqrt(n) if n > 1 else torch.ones_like(mean)
    return (mean - reach).clamp(min=0), (mean + reach).clamp(max=1)


def wilson_interval(share: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Of a share of ``n`` yes-or-no outcomes (Wilson 1927): unlike the normal one, sound near 0 and 1."""
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    reach = Z95 / (1 + Z95**2 / n) * (share * (1 - share) / n + Z95**2 / (4 * n**2)).sqrt()
    return (centre - reach).clamp(min=0), (centre + reach).clamp(max=1)
