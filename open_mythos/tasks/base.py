"""The base class of tasks: seeded generators of problems at any difficulty, with scoring."""

import functools
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from open_mythos.arguments import checked, fitted
from open_mythos.fields import Checked, must
from open_mythos.tasks.tokenizer import check_tokens

UNSCORED = -100
"""Target of positions that loss and accuracy ignore."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Problems and their answers; ``ids, targets, valid = batch`` unpacks the first three.

    Attributes:
        ids: (n, T) int64 tokens.
        targets: (n, T) int64, the correct output at each position, or ``UNSCORED``.
        valid: (n, T) bool, False at padding, which is on the right; or the ids of packed documents from 1, 0 at
            padding; None without padding.
        steps: (n, T, S) int64, targets of what is known after 0, 1, ... S - 1 steps of the solution, the last one the
            answer, or ``UNSCORED``; ``loss.depth="steps"`` supervises loop k with those after k - 1 steps. None for a
            task without steps.
        n_scored: for one process's share of a larger batch, the scored tokens of that whole batch; else None.
    """

    ids: Tensor
    targets: Tensor
    valid: Tensor | None = None
    steps: Tensor | None = None
    n_scored: int | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.ids, self.targets, self.valid))

    def map(self, select: Callable[[Tensor], Tensor]) -> "Batch":
        """Apply ``select`` to every tensor that is not None."""
        names = ("ids", "targets", "valid", "steps")
        parts = {name: part for name in names if (part := getattr(self, name)) is not None}
        return replace(self, **{name: select(part) for name, part in parts.items()})  # type: ignore[arg-type]


class Score(NamedTuple):
    """Accuracy of each problem.

    Attributes:
        tokens: (n,) float32, share of scored positions that are right.
        exact: (n,) bool, whether all scored positions are right.
    """

    tokens: Tensor
    exact: Tensor


class Task(Checked, ABC):
    """A family of problems of increasing difficulty.

    Problems depend on a (CPU) ``torch.Generator`` only. Token 0 is padding. A subclass with options is a dataclass
    with fields from :mod:`open_mythos.fields`; :meth:`to_dict` returns them.

    Attributes:
        name: as in ``tasks.NAMES``.
        version: incremented whenever the same seed gives different problems.
        has_steps: whether its batches have targets for each step of the solution.
        unit: what difficulty counts, in the plural ("bits").
        vocab: text of each token; ``vocab[0]`` is padding.
        least: minimum difficulty.
        most: maximum difficulty, None if unbounded.
        chance: accuracy of guessing, over scored tokens.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    has_steps: ClassVar[bool] = False
    unit: str
    least: ClassVar[int] = 1
    most: int | None = None
    vocab: Sequence[str]
    chance: float

    def __init_subclass__(cls, **options: Any) -> None:
        """Wrap the ``batch`` of every task to check the types of arguments, difficulty, and the number of problems."""
        super().__init_subclass__(**options)
        if (batch := vars(cls).get("batch")) is not None:
            cls.batch = _checked(batch)  # type: ignore[method-assign]

    @property
    def vocab_size(self) -> int:
        """Number of tokens, padding included."""
        return len(self.vocab)

    def length(self, difficulty: int) -> int:
        """Number of tokens of a problem, or the maximum where it varies; ``difficulty`` unless overridden."""
        return difficulty

    def n_steps(self, difficulty: int) -> int:
        """Loops of a solution with one step per loop; ``difficulty + 1`` unless overridden."""
        return difficulty + 1

    def sized(self, size: float) -> Self:
        """The same task with smaller problems, from the smallest at 0 to its own at 1; itself unless overridden."""
        return self

    def by_kind(self, difficulties: Sequence[int]) -> "list[tuple[Task, list[int]]]":
        """The tasks that this one is made of, with their difficulties for its ``difficulties``; empty for most."""
        return []

    def shares(self) -> "list[Share]":
        """The tasks that every training step has one batch of; itself alone for most."""
        return [Share(self.name, 1.0, self)]

    @abstractmethod
    def batch(self, n: int, difficulty: int, generator: torch.Generator | None = None) -> Batch:
        """``n`` problems of one difficulty, drawn from ``generator`` (torch's default one if None).

        Raises:
            ValueError: for a difficulty outside ``least`` to ``most``.
        """

    @checked
    def mixed(self, difficulties: Sequence[int], generator: torch.Generator | None = None) -> Batch:
        """One problem of each of ``difficulties``, padded on the right to the longest."""
        must(len(difficulties) > 0, "difficulties is empty; give at least one")
        return pad([self.batch(1, difficulty, generator) for difficulty in difficulties])

    def held_out(self) -> Self:
        """The same task with problems that training never sees; itself, if it has no ``split``."""
        return replace(self, split="held_out") if hasattr(self, "split") else self  # type: ignore[call-arg]

    def score(self, answers: Tensor, targets: Tensor) -> Score:
        """Compare ``answers`` (n, T) with ``targets`` (n, T) at the scored positions."""
        scored = targets != UNSCORED
        right = (answers == targets) & scored
        return Score(right.sum(1) / scored.sum(1).clamp(min=1), (right | ~scored).all(1))

    def render(self, ids: Sequence[int]) -> str:
        """Tokens as text."""
        return " ".join(self.vocab[i] for i in check_tokens(ids, len(self.vocab)) if i)

    def check(self, difficulty: int) -> None:
        """Raise ValueError unless ``difficulty`` is an integer from ``least`` to ``most``."""
        is_int = isinstance(difficulty, numbers.Integral) and not isinstance(difficulty, bool)
        if not is_int or difficulty < self.least or (self.most is not None and difficulty > self.most):
            end = "up" if self.most is None else f"to {self.most}"
            said = f"difficulty={difficulty!r}; the difficulty of {self.name}"
            raise ValueError(f"{said} is its number of {self.unit}, from {self.least} {end}")


class Share(NamedTuple):
    """One of the tasks that every training step has a batch of.

    Attributes:
        name: of the task.
        weight: share of the step's loss; those of all tasks sum to 1.
        task: makes its problems.
    """

    name: str
    weight: float
    task: Task


def _checked(batch: Callable[..., Batch]) -> Callable[..., Batch]:
    @functools.wraps(batch)
    def call(self: Task, n: int, difficulty: int, *args: Any, **named: Any) -> Batch:
        self.check(difficulty)
        n = fitted("n", n, int)
        must(n >= 1, f"n={n}; use at least 1")
        return batch_of_kinds(self, n, int(difficulty), *args, **named)

    batch_of_kinds = checked(batch)
    return call


def pad(batches: Sequence[Batch]) -> Batch:
    """Concatenate batches of different lengths, padded on the right."""
    packed = any(batch.valid is not None and batch.valid.dtype != torch.bool for batch in batches)
    valid = [torch.ones_like(batch.ids) if batch.valid is None else batch.valid.long() for batch in batches]

    def padded(parts: Iterable[Tensor], padding: int = 0) -> Tensor:
        return pad_sequence([row for rows in parts for row in rows], batch_first=True, padding_value=padding)

    ids, targets = padded(batch.ids for batch in batches), padded((batch.targets for batch in batches), UNSCORED)
    numbers, steps = padded(valid), [batch.steps for batch in batches if batch.steps is not None]
    given = _as_many_steps(steps) if len(steps) == len(batches) else []
    return Batch(
        ids, targets, numbers if packed else None if numbers.all() else numbers.bool(),
        padded(given, UNSCORED) if given else None,
    )  # fmt: skip


def _as_many_steps(parts: Sequence[Tensor]) -> list[Tensor]:
    """(n, T, S) steps of every part, extended to the greatest S by repeating the last step."""
    most = max(part.shape[2] for part in parts)
    return [torch.cat([part, part[..., -1:].expand(-1, -1, most - part.shape[2])], 2) for part in parts]
