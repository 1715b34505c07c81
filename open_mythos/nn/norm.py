"""Root-mean-square layer norm."""

from __future__ import annotations

from torch import nn


class RMSNorm(nn.RMSNorm):
    """``weight * x / rms(x)`` over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467).

    The mean square is taken in float32, so half-precision inputs of any size neither overflow nor vanish.
    """

    eps: float

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps)
