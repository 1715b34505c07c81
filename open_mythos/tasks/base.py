"""What every task is: a seeded generator of problems of any difficulty, and how answers are scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from open_mythos.fields import Checked

UNSCORED = -100
"""Target of a position at which nothing is asked."""


class Batch(NamedTuple):
    """Problems and their answers.

    Attributes:
        ids: (n, T) int64 tokens.
        targets: (n, T) int64, the token that should be answered at each position; ``UNSCORED`` where none is.
        valid: (n, T) bool, False at padding, which stands on the right; None where there is none. Or integers that
            number the documents packed in a row, 0 at padding.
    """

    ids: Tensor
    targets: Tensor
    valid: Tensor | None = None


class Score(NamedTuple):
    """How many answers are right.

    Attributes:
        tokens: share of scored positions that are right, for each problem, (n,) float32.
        exact: whether all scored positions of a problem are right, (n,) bool.
    """

    tokens: Tensor
    exact: Tensor


class Task(Checked, ABC):
    """A family of problems of growing difficulty.

    A task is made with its options as keyword arguments, draws from a (CPU) ``torch.Generator`` only, and knows nothing
    of models. Token 0 is padding in every task. A subclass with options is a dataclass whose fields they are, made
    by the functions in :mod:`open_mythos.fields`, so that :meth:`to_dict` gives them back.

    Attributes:
        name: as in ``tasks.NAMES``.
        version: raised whenever the same seed gives other problems than before.
        unit: what difficulty counts, in the plural ("bits").
        vocab: what each token stands for; ``vocab[0]`` is padding.
        least: the smallest difficulty there is.
        most: the greatest; None if there is none.
        chance: share of scored tokens that guessing gets right.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    unit: str
    least: ClassVar[int] = 1
    most: int | None = None
    vocab: Sequence[str]
    chance: float

    @property
    def vocab_size(self) -> int:
        """Number of tokens, padding included."""
        return len(self.vocab)

    @abstractmethod
    def length(self, difficulty: int) -> int:
        """Tokens of one problem (the longest that may come, where they differ)."""

    @abstractmethod
    def batch(self, n: int, difficulty: int, generator: torch.Generator | None = None) -> Batch:
        """``n`` problems of one difficulty.

        Args:
            n: how many.
            difficulty: at least ``least``.
            generator: random state to draw from; torch's own if None.

        Raises:
            ValueError: for a difficulty that does not exist.
        """

    def mixed(self, difficulties: Sequence[int], generator: torch.Generator | None = None) -> Batch:
        """One problem of each of ``difficulties``, padded on the right to the longest."""
        return pad([self.batch(1, difficulty, generator) for difficulty in difficulties])

    def score(self, answers: Tensor, targets: Tensor) -> Score:
        """Compare ``answers`` (n, T) with ``targets`` (n, T) at the scored positions."""
        scored = targets != UNSCORED
        right = (answers == targets) & scored
        return Score(right.sum(1) / scored.sum(1).clamp(min=1), (right | ~scored).all(1))

    def render(self, ids: Sequence[int]) -> str:
        """Tokens as people read them."""
        return " ".join(self.vocab[i] for i in ids if i)

    def check(self, difficulty: int) -> None:
        """Raise ValueError unless ``difficulty`` exists."""
        whole = isinstance(difficulty, int) and not isinstance(difficulty, bool)
        if not whole or difficulty < self.least or (self.most is not None and difficulty > self.most):
            end = "up" if self.most is None else f"to {self.most}"
            raise ValueError(f"difficulty={difficulty!r}; {self.name} counts {self.unit}, from {self.least} {end}")


def pad(batches: Sequence[Batch]) -> Batch:
    """Put batches of different lengths below each other, padded on the right."""
    width = max(batch.ids.shape[1] for batch in batches)
    n = sum(len(batch.ids) for batch in batches)
    ids = torch.zeros(n, width, dtype=torch.int64)
    targets = torch.full((n, width), UNSCORED)
    numbered = any(batch.valid is not None and batch.valid.dtype != torch.bool for batch in batches)
    valid = torch.zeros(n, width, dtype=torch.int64 if numbered else torch.bool)
    row = 0
    for batch in batches:
        rows, T = slice(row, row + len(batch.ids)), batch.ids.shape[1]
        ids[rows, :T], targets[rows, :T] = batch.ids, batch.targets
        valid[rows, :T] = 1 if batch.valid is None else batch.valid
        row += len(batch.ids)
    return Batch(ids, targets, None if valid.all() and not numbered else valid)
