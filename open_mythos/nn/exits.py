"""Exits: rules for when a position may stop looping. An exit holds settings only; its state is passed between loops.

Every exit here but :class:`Gate` works on any trained model. They all stop when something has converged, which does not
mean that it is done: a position far from what it depends on does not change until that information has arrived.
``patience`` helps with short waits only; :class:`Gate` learns to tell the two apart.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from open_mythos.arguments import checked
from open_mythos.fields import must, nearest
from open_mythos.nn.halting import halting_probability, relative_change

Carried = tuple[Tensor, ...]


@dataclass
class LoopState:
    """The outcome of one loop. ``change`` and ``halting`` are computed when they are first read.

    Attributes:
        loop: number of the loop, from 0; always 0 in depth batching, where rows are at different loops.
        h: (B, T, dim) state after it.
        ran: (B, T) bool, the positions that this loop computed.
        before: (B, T, dim) state before it; None in training, when nothing halts.
        gate: the block's gate; None in training.
        logits: (B, T, vocab_size) predictions from ``h``; None unless the exit in use reads them.
    """

    loop: int
    h: Tensor
    ran: Tensor
    before: Tensor | None = None
    gate: nn.Module | None = None
    logits: Tensor | None = None

    @cached_property
    def change(self) -> Tensor | None:
        """(B, T) ``|h_t - h_{t-1}| / |h_t|``; None in training."""
        return None if self.before is None else relative_change(self.before, self.h)

    @cached_property
    def halting(self) -> Tensor | None:
        """(B, T) halting probability of the gate; None in training."""
        return None if self.gate is None or self.change is None else halting_probability(self.gate, self.h, self.change)


class Exit(ABC):
    """Decides after each loop which positions may stop; positions that have stopped stay so.

    Attributes:
        needs_predictions: whether ``check`` reads ``state.logits``, which cost a pass through coda and head each loop.
    """

    needs_predictions: ClassVar[bool] = False

    @abstractmethod
    def init(self, h: Tensor) -> Carried:
        """The exit's state before the first loop, which starts from the states ``h`` (B, T, dim)."""

    @abstractmethod
    def check(self, carried: Carried, state: LoopState) -> tuple[Tensor, Carried]:
        """(B, T) bool, True where a position may stop after this loop, and the exit's state for the next loop."""


@checked
@dataclass(frozen=True)
class Gate(Exit):
    """The learned gate: stop when its probabilities add up to ``threshold`` (Graves 2016, arXiv:1603.08983).

    The output of a position is its state at that loop, not Graves' mean over loops, which ties a model to its trained
    depth. This is the default exit of a model with ``cfg.halting``, at ``cfg.act_threshold``.

    Args:
        threshold: in (0, 1].
    """

    threshold: float = 0.99

    def __post_init__(self) -> None:
        must(0 < self.threshold <= 1, f"threshold={self.threshold}; use a number in (0, 1]")

    def init(self, h: Tensor) -> Carried:
        return (torch.zeros(h.shape[:2], device=h.device),)

    def check(self, carried: Carried, state: LoopState) -> tuple[Tensor, Carried]:
        assert state.halting is not None, "there is a gate's probability in eval mode"
        mass = carried[0] + state.halting.detach().float()
        return mass >= self.threshold, (mass,)


class ConvergenceExit(Exit):
    """Base of exits that stop after ``patience`` loops in a row whose watched value changed by less than ``threshold``.

    Args:
        threshold: above 0; of :class:`PredictionKL` in nats.
        patience: at least 1.

    Raises:
        ValueError: for other values.
    """

    patience: int
    compares: ClassVar[int] = 2  # how many loops' values `is_still` takes

    def __post_init__(self) -> None:
        threshold = getattr(self, "threshold", 1.0)
        must(threshold > 0, f"threshold={threshold}; use a number above 0")
        must(self.patience >= 1, f"patience={self.patience!r}; use a whole number of at least 1")

    def init(self, h: Tensor) -> Carried:
        count = torch.zeros(h.shape[:2], dtype=torch.int64, device=h.device)
        if self.needs_predictions or self.compares == 1:
            return (count,)
        # States before the first are unknown; no comparison with NaN is true, so nothing counts as still.
        return (count, *[torch.full_like(h, math.nan)] * (self.compares - 2), h.detach())

    def check(self, carried: Carried, state: LoopState) -> tuple[Tensor, Carried]:
        count, *seen = carried
        seen = [*seen, self.watch(state)]
        if len(seen) < self.compares:
            return count >= self.patience, (count, *seen)
        count = (count + 1) * self.is_still(*seen)
        return count >= self.patience, (count, *seen[1:])

    def watch(self, state: LoopState) -> Tensor:
        """The value that is compared from loop to loop, (B, T, ...): the state, unless a subclass overrides this."""
        return state.h.detach()

    @abstractmethod
    def is_still(self, *seen: Tensor) -> Tensor:
        """(B, T) bool, whether a position has converged, given the watched values of the last ``compares`` loops."""


@checked
@dataclass(frozen=True)
class StateChange(ConvergenceExit):
    """Stop when a state hardly moves: ``|h_t - h_{t-1}| / |h_t|`` below a threshold (Huginn, arXiv:2502.05171)."""

    threshold: float = 0.03
    patience: int = 1
    compares: ClassVar[int] = 1

    def watch(self, state: LoopState) -> Tensor:
        assert state.change is not None, "there is a change in eval mode"
        return state.change.detach()

    def is_still(self, *seen: Tensor) -> Tensor:
        return seen[-1] < self.threshold


@checked
@dataclass(frozen=True)
class Acceleration(ConvergenceExit):
    """Stop when a state moves evenly: ``|h_t - 2 h_{t-1} + h_{t-2}| / |h_t|`` below a threshold (arXiv:2509.23314)."""

    threshold: float = 0.03
    patience: int = 1
    compares: ClassVar[int] = 3

    def is_still(self, *seen: Tensor) -> Tensor:
        first, second, third = (x.float() for x in seen)
        return _size(third - 2 * second + first) < self.threshold * _size(third)


@checked
@dataclass(frozen=True)
class PredictionKL(ConvergenceExit):
    """Stop when a prediction hardly changes: ``KL(p_t || p_{t-1})`` below a threshold (Huginn, arXiv:2502.05171)."""

    threshold: float = 5e-4
    patience: int = 1
    needs_predictions: ClassVar[bool] = True

    def watch(self, state: LoopState) -> Tensor:
        return _logits(state).float().log_softmax(-1)

    def is_still(self, *seen: Tensor) -> Tensor:
        before, now = seen
        return (now.exp() * (now - before)).sum(-1) < self.threshold


@checked
@dataclass(frozen=True)
class StableArgmax(ConvergenceExit):
    """Stop when the most likely token is the same as after the previous loop."""

    patience: int = 3
    needs_predictions: ClassVar[bool] = True

    def watch(self, state: LoopState) -> Tensor:
        return _logits(state).argmax(-1)

    def is_still(self, *seen: Tensor) -> Tensor:
        before, now = seen
        return before == now


NAMES: dict[str, type[Exit]] = {
    "gate": Gate,
    "change": StateChange,
    "acceleration": Acceleration,
    "kl": PredictionKL,
    "argmax": StableArgmax,
}


@checked
def parse(exit: str) -> Exit:
    """The exit that ``"NAME"``, ``"NAME:setting"`` or ``"NAME:setting:setting"`` stands for, as in ``"kl:5e-4:2"``.

    Settings come in the order of the exit's arguments; those left out have their defaults.

    Raises:
        ValueError: for a name not in ``NAMES``, with the nearest, and for settings that do not fit.
    """
    name, *values = exit.split(":")
    must(name in NAMES, f"there is no exit {name!r}; {nearest(name, NAMES)}")
    kind: Any = NAMES[name]
    settings = [field.name for field in fields(kind)]
    usage = ":".join([name, *settings])
    must(len(values) <= len(settings), f"exit {exit!r} has {len(values)} settings; use {usage}")
    try:
        numbers = [
            int(value) if setting == "patience" else float(value)
            for setting, value in zip(settings, values, strict=False)
        ]
    except ValueError as error:
        raise ValueError(f"exit {exit!r} has a setting that is not a number; use {usage}") from error
    try:
        return kind(*numbers)
    except ValueError as error:
        raise ValueError(f"exit {exit!r}: {error}") from error


def spell(exit: Exit) -> str:
    """The text that :func:`parse` reads as ``exit``; ``str(exit)`` for an exit that is not in ``NAMES``."""
    name = next((name for name, kind in NAMES.items() if kind is type(exit)), None)
    values = [getattr(exit, field.name) for field in fields(exit)] if name else []  # type: ignore[arg-type]
    settings = [short if float(short := f"{value:g}") == value else repr(value) for value in values]
    return ":".join([name, *settings]) if name else str(exit)


def _size(x: Tensor) -> Tensor:
    """Norm over the last axis, in float32."""
    return x.float().norm(dim=-1)


def _logits(state: LoopState) -> Tensor:
    assert state.logits is not None, "RecurrentBlock.iterate reads predictions for exits that need them"
    return state.logits.detach()
