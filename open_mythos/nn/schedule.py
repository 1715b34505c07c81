"""How training runs the loops: how many for each sequence, and through which of them gradients flow."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Among(NamedTuple):
    """The sequences of all processes that run in lock-step: while any of them runs a loop, every process does, even if
    none of its own sequences does.

    Attributes:
        n_loops, n_grad: (n,) of each sequence, as in :class:`Schedule`.
        meet: called before a loop is computed or recomputed, with which sequences run it, (n,), and their length.
    """

    n_loops: Tensor
    n_grad: Tensor
    meet: Callable[[Tensor, int], None]


@dataclass(frozen=True)
class Schedule:
    """How training runs the loops: each sequence its own number of them, with gradient through the last ones.

    Args:
        n_loops: (B,) loops of each sequence, at least 1; on the CPU, so that nothing waits for a GPU.
        n_grad: (B,) how many of these, the last ones, have gradient, at least 1; on the CPU.
        damping: weight of the new state in each loop with gradient; below 1, gradients are those of a damped fixed
            point iteration ("phantom gradients", Geng et al. 2021, arXiv:2111.05177).
        recompute: keep only the input state of each loop with gradient, and compute it again in the backward pass.
        around: called on the state before a loop that is recomputed, with the loop's number, and, with 0, on the last.
        detach: start every loop with gradient from a detached state, so that a loss on a loop trains this loop and the
            encoded input that all loops read, but not earlier loops.
        among: sequences of all processes that run in lock-step with these; None if these run alone.
    """

    n_loops: Tensor
    n_grad: Tensor
    damping: float = 1.0
    recompute: bool = False
    around: Callable[[Tensor, int], Tensor] = lambda h, loop: h
    detach: bool = False
    among: Among | None = None

    @property
    def last(self) -> int:
        """Largest number of loops of any sequence, over all processes in lock-step."""
        return int((self.n_loops if self.among is None else self.among.n_loops).max())

    def groups(self, loop: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
        """Yield the sequences (R,) that run a loop, on the CPU, those without gradient first, then those with.

        With each: (n,) bool, which sequences of ``among`` run it, and whether it has gradient.
        """
        mine = _running(loop, self.n_loops, self.n_grad)
        anyones = mine if self.among is None else _running(loop, *self.among[:2])
        for rows, others, with_grad in zip(mine, anyones, (False, True), strict=True):
            if others.any():
                yield rows.nonzero().squeeze(1), others, with_grad


def _running(loop: int, n_loops: Tensor, n_grad: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) bool each: which sequences run a loop without gradient, and which with."""
    without = loop < n_loops - n_grad
    return without, (loop < n_loops) & ~without


class Stage(NamedTuple):
    """The outcome of one loop, for the sequences that ran it with gradient.

    Attributes:
        rows: (R,) int64, which sequences of the batch; on the CPU, so that nothing waits for a GPU.
        before, after: (R, T, dim), their states before and after the loop.
        left: (R,) int64, loops that each still has to run, 0 after its last; on the CPU.
    """

    rows: Tensor
    before: Tensor
    after: Tensor
    left: Tensor


def take(x: Tensor, rows: Tensor) -> Tensor:
    """``x[rows]``, or ``x`` if these are all; ``rows`` (R,) int64 may be on the CPU, and nothing waits for a GPU."""
    return x if len(rows) == len(x) else x[rows.to(x.device, non_blocking=True)]


def put(x: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    """``x`` with its ``rows`` replaced by ``new``, or ``new`` itself if these are all."""
    return new if len(rows) == len(x) else x.index_copy(0, rows.to(x.device, non_blocking=True), new.to(x.dtype))
