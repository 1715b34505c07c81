"""The halting gate: which positions have finished thinking, and how it learns to say so."""

from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.nn.linear import WEIGHT_STD, Linear, call
from open_mythos.ops.dispatch import is_traced

MIN_CHANGE = 1e-3  # changes below it look alike to a gate: bfloat16 knows none that are smaller
EARLY_EXIT_WEIGHT = 30.0  # how much worse it is to halt a state that still moves than to run one that has converged
INITIAL_LOGIT = -4.0  # a new gate lets 50 loops pass before it halts anything


def relative_change(before: Tensor, after: Tensor) -> Tensor:
    """``|after - before| / |after|`` over the last axis, in float32; 0 where both are 0."""
    before, after = before.float(), after.float()
    size = torch.linalg.vector_norm(after, dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.linalg.vector_norm(after - before, dim=-1) / size


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
        nn.init.constant_(self.halt.bias, INITIAL_LOGIT * self.std)

    def forward(self, h: Tensor, change: Tensor | None = None) -> Tensor:
        """(B, T, dim) states, and their :func:`relative_change` (B, T), 1 if None, to (B, T) probabilities."""
        hidden = call(self.hidden, F.rms_norm(h, h.shape[-1:], eps=1e-6))
        change = _at_hand.get() if change is None and not is_traced() else change
        if change is not None:
            hidden = hidden + (change.to(hidden.dtype) + MIN_CHANGE).log().unsqueeze(-1) * (self.motion / self.std)
        return (self.halt(F.silu(hidden) * self.halt.in_features**-0.5).squeeze(-1) / self.std).sigmoid()


_at_hand: ContextVar[Tensor | None] = ContextVar("at_hand", default=None)
"""What the states have moved that a replaced gate, which is given states alone, is asked about."""

OWN_GATE = ACTHalting.forward


def is_replaced(act: nn.Module) -> bool:
    """Whether somebody has put another gate in the place of ``act``, or in that of its ``forward``."""
    return getattr(act.forward, "__func__", None) is not OWN_GATE


def halting_probability(act: nn.Module, h: Tensor, change: Tensor) -> Tensor:
    """(B, T) probabilities of the gate ``act``, from states and their :func:`relative_change`.

    Args:
        act: an :class:`ACTHalting`, or what was put in its place or its ``forward``'s, which gets states alone.
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
    """Where (loops, ...) bool holds at this loop and at every later one."""
    return holds.flip(0).cumprod(0).flip(0).bool()


def converged(states: Tensor, tolerance: float, end: Tensor | None = None) -> Tensor:
    """Which states are final: from that loop on, never further than ``tolerance`` from where the position ends.

    Args:
        states: (loops, B, T, dim), one after each loop.
        tolerance: distance relative to the norm of ``end``.
        end: (B, T, dim), where they end; the last of ``states`` if None.

    Returns:
        (loops, B, T) bool, once True then True.
    """
    end = (states[-1] if end is None else end).float()
    return holds_from_here_on((states.float() - end).norm(dim=-1) <= tolerance * end.norm(dim=-1))


def gate_cross_entropy(probability: Tensor, may_stop: Tensor, early_exit_weight: float) -> Tensor:
    """Cross-entropy of the gate for labels ``may_stop``, weighted by ``early_exit_weight`` where it should not stop.

    Shapes are those given; float32.
    """
    p = probability.float().clamp(1e-6, 1 - 1e-6)
    # Written out, since F.binary_cross_entropy refuses to run under CUDA autocast.
    return -torch.where(may_stop, p.log(), early_exit_weight * (1 - p).log())


def gate_loss(act: nn.Module, states: Tensor, live: Tensor, tolerance: float) -> Tensor:
    """:func:`gate_cross_entropy` against :func:`converged`, on states without their history: a scalar.

    Args:
        act: the gate.
        states: (1 + loops, B, T, dim), the first before any loop.
        live: (B, T) bool, False at padding.
        tolerance: see :func:`converged`.
    """
    states = states.detach()
    known = states[1:-1]  # whether the last has converged is not known
    change = relative_change(states[:-2], known)
    probability = halting_probability(act, known.flatten(0, 1), change.flatten(0, 1)).view(known.shape[:-1])
    losses = gate_cross_entropy(probability, converged(states[1:], tolerance)[:-1], EARLY_EXIT_WEIGHT)
    return (losses * live).sum() / (live.sum() * len(known)).clamp(min=1)
