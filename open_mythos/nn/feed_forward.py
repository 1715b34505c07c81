"""Dense SwiGLU feed-forward."""

from __future__ import annotations

from torch import Tensor, nn

from open_mythos.nn.linear import WEIGHT_STD, Linear, apply, residual_gain, side_by_side
from open_mythos.ops.swiglu import swiglu


class Expert(nn.Module):
    """SwiGLU feed-forward ``down(silu(gate(x)) * up(x))`` (Shazeer 2020, arXiv:2002.05202): (..., dim) -> (..., dim).

    Used as the feed-forward of prelude and coda and as the always-on shared experts.

    Args:
        dim: model width.
        expert_dim: hidden width.
        n_layers: depth of the stack it stands in, which sets the size of its output at initialisation.
        std: see :class:`Linear`.
    """

    def __init__(self, dim: int, expert_dim: int, n_layers: int = 1, std: float = WEIGHT_STD) -> None:
        super().__init__()
        self.gate = Linear(dim, expert_dim, std=std)
        self.up = Linear(dim, expert_dim, std=std)
        self.down = Linear(expert_dim, dim, gain=residual_gain(n_layers), std=std)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = side_by_side(x, self.gate, self.up)
        return apply(self.down, swiglu(gate, up))
