"""Muon for matrices that several processes divide."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from open_mythos.training.parallel.pieces import Piece


class PiecewiseMuon(torch.optim.Muon):
    """:class:`torch.optim.Muon` with divided momentum, and updates computed from whole matrices.

    Every process that holds a piece of a matrix computes the whole update and applies its part: one gather of the size
    of the gradient, and no scatter.

    Args:
        pieces: of the matrices.
        options: of :class:`torch.optim.Muon`.
    """

    def __init__(self, pieces: Sequence[Piece], **options: Any) -> None:
        self.pieces = {piece.held: piece for piece in pieces}
        super().__init__(list(self.pieces), **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            options = {name: group[name] for name in ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
            for held in group["params"]:
                if held.grad is None:
                    continue
                momentum = self.state[held].setdefault("momentum_buffer", torch.zeros_like(held))
                momentum.lerp_(held.grad, 1 - group["momentum"])
                ahead = held.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                change = nn.Parameter(torch.zeros(self.pieces[held].shape, dtype=held.dtype, device=held.device))
                change.grad = self.pieces[held].whole(ahead)
                torch.optim.Muon([change], weight_decay=0.0, momentum=0.0, nesterov=False, **options).step()
                held.mul_(1 - group["lr"] * group["weight_decay"]).add_(self.pieces[held].part(change.detach()))
