"""Short causal convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from open_mythos.nn.linear import WEIGHT_STD
from open_mythos.ops.conv import causal_conv


class ShortConv(nn.Module):
    """Depth-wise causal convolution over the last few tokens: (B, S, channels) -> (B, S, channels).

    Gives attention's keys and values a direct view of the previous token, so that information moves one position
    along at every loop without a head having to learn it (the idea of Canon layers, Allen-Zhu 2025). It stands on
    the cached side of attention, so a cache holds the same rows, and no more, with it as without.

    Like the matrices of :class:`~open_mythos.nn.linear.Linear`, taps are stored at the scale of ``std``.

    Args:
        channels: width of the rows.
        n_taps: tokens each output sees, its own included.
        share: neighbouring channels that have the same taps; 2 for rotated keys, whose channels turn in pairs and
            must keep doing so for scores to depend on distances alone.
        std: see above.
    """

    def __init__(self, channels: int, n_taps: int, share: int = 1, std: float = WEIGHT_STD) -> None:
        super().__init__()
        self.share, self.std = share, std
        self.taps = nn.Parameter(torch.empty(n_taps, channels // share))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Near the identity, with some of the previous token mixed in."""
        start = torch.zeros_like(self.taps)
        start[0] = 1.0
        start[1:2] = 0.3
        with torch.no_grad():
            self.taps.normal_(std=0.1).add_(start).mul_(self.std)

    def kernel(self) -> Tensor:
        """The taps of every channel: (n_taps, channels)."""
        taps = self.taps / self.std
        return taps if self.share == 1 else taps.unsqueeze(2).expand(-1, -1, self.share).flatten(1)

    def forward(self, x: Tensor, starts: Tensor | None = None) -> Tensor:
        """``starts``: (B, S) where the document of each row starts, before which nothing is seen; None if it is one."""
        return causal_conv(x, self.kernel(), starts)
