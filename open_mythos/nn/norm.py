"""Root-mean-square layer norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from open_mythos.ops.norm import rms_norm


class RMSNorm(nn.Module):
    """``weight * x / rms(x)`` over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467).

    The mean square is taken in float32, so half-precision inputs of any size neither overflow nor vanish.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
