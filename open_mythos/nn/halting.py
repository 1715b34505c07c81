"""Adaptive halting: which positions have finished thinking."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.nn.linear import WEIGHT_STD, Linear
from open_mythos.nn.norm import rms_normalise

_CAUTION = 30.0  # how much worse it is to halt a state that still moves than to run one that has settled
_START = -4.0  # logit of a new gate: it lets 50 loops pass before it halts anything


class ACTHalting(nn.Module):
    """The halting gate: a probability for each position, from its state alone: (B, T, dim) -> (B, T).

    Args:
        dim: width of the state.
        std: see :class:`Linear`.
    """

    def __init__(self, dim: int, std: float = WEIGHT_STD) -> None:
        super().__init__()
        self.hidden = Linear(dim, min(dim, 256), std=std)
        self.halt = nn.Linear(min(dim, 256), 1)
        self.std = std
        nn.init.zeros_(self.halt.weight)
        nn.init.constant_(self.halt.bias, _START * std)

    def forward(self, h: Tensor) -> Tensor:
        found = F.silu(self.hidden(rms_normalise(h))) * self.halt.in_features**-0.5
        return (self.halt(found).squeeze(-1) / self.std).sigmoid()


class HaltingState:
    """Which of the (B, T) positions still run, after Graves 2016 (arXiv:1603.08983).

    A position halts after the loop at which the sum of its probabilities reaches the threshold. Its output is its
    state at that loop, not Graves' mean over loops, which ties a model to its trained depth: the halting weights
    are one for that loop and zero for the others, and at the last loop whatever still runs is taken.

    Args:
        running: (B, T) bool, False for positions that never run (padding).
        threshold: in (0, 1].
    """

    def __init__(self, running: Tensor, threshold: float) -> None:
        self.running = running
        self.threshold = threshold
        self.mass = torch.zeros(running.shape, device=running.device)

    def update(self, probability: Tensor) -> None:
        """Account for the gate's ``probability`` (B, T) after a loop."""
        self.mass = self.mass + torch.where(self.running, probability.detach().float(), 0.0)
        self.running = self.running & (self.mass < self.threshold)


def settled(states: Tensor, tolerance: float) -> Tensor:
    """Which states are final: from that loop on, never further than ``tolerance`` from where the position ends.

    Args:
        states: (loops, B, T, dim), one after each loop.
        tolerance: distance relative to the norm of the last state.

    Returns:
        (loops, B, T) bool, once True then True.
    """
    end = states[-1].float()
    near = (states.float() - end).norm(dim=-1) <= tolerance * end.norm(dim=-1)
    return near.flip(0).cumprod(0).flip(0).bool()


def gate_loss(act: nn.Module, states: Tensor, live: Tensor, tolerance: float) -> Tensor:
    """Cross-entropy of the gate against :func:`settled`, on states without their history: a scalar.

    Args:
        act: the gate.
        states: (loops, B, T, dim).
        live: (B, T) bool, False at padding.
        tolerance: see :func:`settled`.
    """
    known = states[:-1].detach()  # whether the last has settled is not known
    target = settled(states.detach(), tolerance)[:-1].float()
    probability = act(known.flatten(0, 1)).view_as(target).float().clamp(1e-6, 1 - 1e-6)
    # Written out, since F.binary_cross_entropy refuses to run under CUDA autocast.
    surprise = -(target * probability.log() + _CAUTION * (1 - target) * (1 - probability).log())
    return (surprise * live).sum() / (live.sum() * len(known)).clamp(min=1)


class _WithLoss(torch.autograd.Function):
    """Identity on ``x`` whose backward also starts the backward of ``loss``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_dtype = loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones((), dtype=ctx.loss_dtype, device=grad.device)


def with_loss(x: Tensor, loss: Tensor) -> Tensor:
    """``x``, unchanged; whatever is trained through it trains ``loss`` too, with nothing for the caller to add."""
    return _WithLoss.apply(x, loss)
