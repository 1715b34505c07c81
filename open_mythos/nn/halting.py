"""The halting gate, which predicts the positions that have converged, and its loss."""

from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.nn.linear import WEIGHT_STD, Linear, call
from open_mythos.ops.dispatch import is_traced

MIN_CHANGE = 1e-3  # smaller changes look alike to the gate: bfloat16 cannot tell them apart
EARLY_EXIT_WEIGHT = 30.0  # loss weight of halting a state that still moves, relative to running a converged one
INITIAL_LOGIT = -4.0  # an untrained gate halts nothing before 50 loops


def relative_change(before: Tensor, after: Tensor) -> Tensor:
    """``|after - before| / |after|`` over the last axis, in float32; 0 where both are 0."""
    before, after = before.float(), after.float()
    size = torch.linalg.vector_norm(after, dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.linalg.vector_norm(after - before, dim=-1) / size


class ACTHalting(nn.Module):
    """The halting gate: a probability for each position, from its state and the state's change in the last loop.

    Both are needed. A position that information has not reached yet may be as still as one that is done, and a
    transient state may look like a final one.

    Args:
        dim: width of the state.
        std: see :class:`Linear`.
    """

    def __init__(self, dim: int, std: float = WEIGHT_STD) -> None:
        super().__init__()
        self.hidden = Linear(dim, min(dim, 256), std=std)
        self.motion = nn.Parameter(torch.zeros(min(dim, 256)))  # each hidden unit's weight of the log change
        self.halt = nn.Linear(min(dim, 256), 1)
        self.std = std
        self.reset()

    def reset(self) -> None:
        """Reset the output layer, so that all states get the same probability; the hidden layer keeps its weights."""
        nn.init.zeros_(self.halt.weight)
        nn.init.constant_(self.halt.bias, INITIAL_LOGIT * self.std)

    def forward(self, h: Tensor, change: Tensor | None = None) -> Tensor:
        """(B, T, dim) states, and their :func:`relative_change` (B, T), 1 if None, to (B, T) probabilities."""
        hidden = call(self.hidden, F.rms_norm(h, h.shape[-1:], eps=1e-6))
        change = _at_hand.get() if change is None and not is_traced() else change
        if change is not None:
            hidden = hidden + (change.to(hidden.dtype) + MIN_CHANGE).log().unsqueeze(-1) * (self.motion / self.std)
        return (self.halt(F.silu(hidden) * self.halt.in_features**-0.5).squeeze(-1) / self.std).sigmoid()


_at_hand: ContextVar[Tensor | None] = ContextVar("at_hand", default=None)
"""The relative change for a replaced gate that wraps an :class:`ACTHalting`, as it is called with states alone."""

OWN_GATE = ACTHalting.forward


def is_replaced(act: nn.Module) -> bool:
    """Whether ``act`` is not an :class:`ACTHalting`, or its ``forward`` was replaced."""
    return getattr(act.forward, "__func__", None) is not OWN_GATE


def halting_probability(act: nn.Module, h: Tensor, change: Tensor) -> Tensor:
    """(B, T) probabilities of the gate ``act``, from states and their :func:`relative_change`.

    Args:
        act: an :class:`ACTHalting`, or a replacement of it or of its ``forward``, which is called with states alone.
        h: (B, T, dim).
        change: (B, T).
    """
    if not is_replaced(act):
        return act(h, change)
    token = _at_hand.set(change)
    try:
        return act(h)
    finally:
        _at_hand.reset(token)


def holds_from_here_on(holds: Tensor) -> Tensor:
    """(loops, ...) bool: whether ``holds`` is True at this loop and at every later one."""
    return holds.flip(0).cumprod(0).flip(0).bool()


def converged(states: Tensor, tolerance: float, end: Tensor | None = None) -> Tensor:
    """Which states have converged: from that loop on, never further than ``tolerance`` from the final state.

    Args:
        states: (loops, B, T, dim), one after each loop.
        tolerance: distance relative to the norm of ``end``.
        end: (B, T, dim), the final states; the last of ``states`` if None.

    Returns:
        (loops, B, T) bool; once True for a position, it stays True.
    """
    end = (states[-1] if end is None else end).float()
    return holds_from_here_on((states.float() - end).norm(dim=-1) <= tolerance * end.norm(dim=-1))


def gate_cross_entropy(probability: Tensor, may_stop: Tensor, early_exit_weight: float) -> Tensor:
    """Cross-entropy of the gate for labels ``may_stop``, weighted by ``early_exit_weight`` where it should not stop.

    In the shape of the arguments, float32.
    """
    p = probability.float().clamp(1e-6, 1 - 1e-6)
    # Written out, since F.binary_cross_entropy refuses to run under CUDA autocast.
    return -torch.where(may_stop, p.log(), early_exit_weight * (1 - p).log())


def gate_loss(act: nn.Module, states: Tensor, live: Tensor, tolerance: float) -> Tensor:
    """:func:`gate_cross_entropy` with :func:`converged` as labels, on detached states, averaged: a scalar.

    Args:
        act: the gate.
        states: (1 + loops, B, T, dim), the first before any loop.
        live: (B, T) bool, False at padding.
        tolerance: see :func:`converged`.
    """
    states = states.detach()
    known = states[1:-1]  # the last state is the reference itself, so its label is unknown
    change = relative_change(states[:-2], known)
    probability = halting_probability(act, known.flatten(0, 1), change.flatten(0, 1)).view(known.shape[:-1])
    losses = gate_cross_entropy(probability, converged(states[1:], tolerance)[:-1], EARLY_EXIT_WEIGHT)
    return (losses * live).sum() / (live.sum() * len(known)).clamp(min=1)
