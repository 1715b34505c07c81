"""Input injection: the linear, stable part of the recurrence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MARGIN = 2.0**-7
"""What A keeps from 0 and 1; exact in bfloat16 and float16, so A stays inside (0, 1) there too."""


class LTIInjection(nn.Module):
    """``A * h + B * e + transformer_out`` with diagonal A and B, and every entry of A strictly inside (0, 1).

    A linear time-invariant recurrence ``h <- A h + B e`` is stable when the spectral radius of A is below one
    (Parcae, arXiv:2604.12946). Here A *is* its parameter, ``raw_A``, and where an update pushes a value past
    [margin, 1 - margin] it is folded back like light between two mirrors. So A is inside (0, 1) for every finite
    parameter value and in every dtype, and dA/dparameter is +1 or -1 everywhere: the gradient cannot die, as it
    does at the ends of a sigmoid or under a clamp.

    Args:
        dim: channels.
        decay: initial A.
        gain: initial B.
        margin: with 0, A may be 0 or 1, for which stability then holds no longer.
    """

    def __init__(self, dim: int, decay: float = 0.7, gain: float = 0.7, margin: float = MARGIN) -> None:
        super().__init__()
        self.margin = margin
        self.raw_A = nn.Parameter(torch.full((dim,), decay))
        self.B = nn.Parameter(torch.full((dim,), gain))

    def get_A(self) -> Tensor:
        """The decay of each channel: (dim,), strictly inside (0, 1). Its maximum is the spectral radius."""
        width = 1.0 - 2 * self.margin
        phase = torch.remainder(self.raw_A.float() - self.margin, 2 * width)
        folded = torch.where(phase <= width, phase, 2 * width - phase)
        return (self.margin + folded).to(self.raw_A.dtype)

    def forward(self, h: Tensor, e: Tensor, transformer_out: Tensor | None = None) -> Tensor:
        """One step of the recurrence.

        Args:
            h: state, (..., dim).
            e: encoded input, (..., dim).
            transformer_out: what the block adds, (..., dim); left out, only the linear part is returned.
        """
        out = self.get_A() * h + self.B * e
        return out if transformer_out is None else out + transformer_out
