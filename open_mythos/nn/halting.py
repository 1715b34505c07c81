"""The halting gate: which positions have finished thinking, and how it learns to say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.nn.linear import WEIGHT_STD, Linear, apply
from open_mythos.ops.gate import FINEST, follow_gate, gate, relative_change
from open_mythos.ops.kernels import has_kernels
from open_mythos.ops.norm import rms_norm

_CAUTION = 30.0  # how much worse it is to halt a state that still moves than to run one that has settled
_START = -4.0  # logit of a new gate: it lets 50 loops pass before it halts anything


class ACTHalting(nn.Module):
    """The halting gate: a probability for each position, from its state and how far that has just moved.

    Both are needed. A position that the solution has not reached yet may sit as still as one that is done, and a state
    that is only passing through may look like a final one.

    Args:
        dim: width of the state.
        std: see :class:`Linear`.
    """

    def __init__(self, dim: int, std: float = WEIGHT_STD) -> None:
        super().__init__()
        self.hidden = Linear(dim, min(dim, 256), std=std)
        self.motion = nn.Parameter(torch.zeros(min(dim, 256)))  # what a hidden unit makes of the change
        self.halt = nn.Linear(min(dim, 256), 1)
        self.std = std
        self.reset()

    def reset(self) -> None:
        """Treat all states alike again; the hidden layer keeps what it has learned to see."""
        nn.init.zeros_(self.halt.weight)
        nn.init.constant_(self.halt.bias, _START * self.std)

    def forward(self, h: Tensor, change: Tensor | None = None) -> Tensor:
        """(B, T, dim) states, and their :func:`relative_change` (B, T), 1 if None, to (B, T) probabilities."""
        hidden, halt = self.hidden, self.halt
        if self._is_plain(h, hidden, halt):
            return gate(h, change, hidden.weight, hidden.scale, self.motion, halt.weight, halt.bias, 1 / self.std)
        seen = apply(hidden, rms_norm(h))
        if change is not None:
            seen = seen + (change.to(seen.dtype) + FINEST).log().unsqueeze(-1) * self.motion / self.std
        found = F.silu(seen) * halt.in_features**-0.5
        return (halt(found).squeeze(-1) / self.std).sigmoid()

    @staticmethod
    def _is_plain(h: Tensor, hidden: nn.Module, halt: nn.Module) -> bool:
        """Whether C code can ask in place of the layers: they are our own, unwatched, and no gradient is wanted."""
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return False
        for layer, kind in ((hidden, Linear), (halt, nn.Linear)):
            if type(layer) is not kind or layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
                return False
        assert isinstance(hidden, Linear) and isinstance(halt, nn.Linear)
        return has_kernels(h, hidden.weight, halt.weight)


_FORWARD = ACTHalting.forward


def is_replaced(act: nn.Module) -> bool:
    """Whether somebody has put another gate in the place of ``act``, or in that of its ``forward``."""
    return getattr(act.forward, "__func__", None) is not _FORWARD


def ask(act: nn.Module, h: Tensor, change: Tensor) -> Tensor:
    """What the gate ``act`` says of states and their :func:`relative_change`; one of somebody else's sees states alone.

    Args:
        act: an :class:`ACTHalting`, or what was put in its place or in that of its ``forward``.
        h: (B, T, dim).
        change: (B, T).

    Returns:
        (B, T) probabilities.
    """
    return act(h) if is_replaced(act) else act(h, change)


def follow(act: nn.Module, h: Tensor) -> Callable[[Tensor, Tensor], float] | None:
    """What the gate says of one position, given its states (1, 1, dim) before and after a loop; as a number, at once.

    Args:
        act: as for :func:`ask`.
        h: its first state, (1, 1, dim).

    Returns:
        None where :func:`ask` has to be called instead.
    """
    if not isinstance(act, ACTHalting) or is_replaced(act) or not act._is_plain(h, act.hidden, act.halt):
        return None
    hidden, halt = act.hidden, act.halt
    return follow_gate(h, hidden.weight, hidden.scale, act.motion, halt.weight, halt.bias, 1 / act.std)


def from_here_on(holds: Tensor) -> Tensor:
    """Where (loops, ...) bool holds at this loop and at every later one."""
    return holds.flip(0).cumprod(0).flip(0).bool()


def settled(states: Tensor, tolerance: float, end: Tensor | None = None) -> Tensor:
    """Which states are final: from that loop on, never further than ``tolerance`` from where the position ends.

    Args:
        states: (loops, B, T, dim), one after each loop.
        tolerance: distance relative to the norm of ``end``.
        end: (B, T, dim), where they end; the last of ``states`` if None.

    Returns:
        (loops, B, T) bool, once True then True.
    """
    end = (states[-1] if end is None else end).float()
    return from_here_on((states.float() - end).norm(dim=-1) <= tolerance * end.norm(dim=-1))


def surprise(probability: Tensor, may_stop: Tensor, caution: float) -> Tensor:
    """Cross-entropy of the gate, ``caution`` times as dear where it should not stop as where it may.

    Args:
        probability: what the gate says, any shape.
        may_stop: bool, what it should say, as ``probability``.
        caution: above 0.

    Returns:
        As ``probability``, float32.
    """
    p = probability.float().clamp(1e-6, 1 - 1e-6)
    # Written out, since F.binary_cross_entropy refuses to run under CUDA autocast.
    return -torch.where(may_stop, p.log(), caution * (1 - p).log())


def gate_loss(act: nn.Module, states: Tensor, live: Tensor, tolerance: float) -> Tensor:
    """:func:`surprise` of the gate against :func:`settled`, on states without their history: a scalar.

    Args:
        act: the gate.
        states: (1 + loops, B, T, dim), the first before any loop.
        live: (B, T) bool, False at padding.
        tolerance: see :func:`settled`.
    """
    states = states.detach()
    known = states[1:-1]  # whether the last has settled is not known
    change = relative_change(states[:-2], known)
    probability = ask(act, known.flatten(0, 1), change.flatten(0, 1)).view(known.shape[:-1])
    losses = surprise(probability, settled(states[1:], tolerance)[:-1], _CAUTION)
    return (losses * live).sum() / (live.sum() * len(known)).clamp(min=1)


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
