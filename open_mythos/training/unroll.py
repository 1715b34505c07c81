"""Running the loop for training: how many times each sequence, with gradient through which of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from open_mythos.model import OpenMythos
from open_mythos.ops.mask import CausalMask
from open_mythos.training.allocator import give_back_here

_GIVE_BACK = 4  # recomputed loops after which free pages go back to the system; more take less time, and more memory


@dataclass
class Stage:
    """The outcome of one loop, for the sequences that ran it with gradient.

    Attributes:
        rows: (R,) int64, which sequences of the batch; on the CPU, so that nobody who asks waits for a GPU.
        before, after: (R, T, dim), their states before and after the loop.
        left: (R,) int64, loops that each still has to run; 0 at its last. On the CPU.
    """

    rows: Tensor
    before: Tensor
    after: Tensor
    left: Tensor


def unroll(
    model: OpenMythos,
    h: Tensor,
    e: Tensor,
    freqs: Tensor,
    mask: CausalMask,
    n_loops: Tensor,
    n_grad: Tensor,
    damping: float = 1.0,
    recompute: bool = False,
) -> Iterator[Stage]:
    """Run every sequence for its own number of loops, in training mode; hand out the loops that have gradient.

    No sequence waits for another: a loop computes the rows that still run, and nothing else.

    Args:
        model: its recurrent block is run.
        h: first states, (B, T, dim).
        e: encoded input, (B, T, dim).
        freqs: rotary phasors of the T positions; with a leading batch dimension if the sequences' positions differ.
        mask: who sees whom.
        n_loops: (B,) loops of each sequence, at least 1; on the CPU.
        n_grad: (B,) how many of these, the last ones, have gradient; on the CPU.
        damping: share of the new state in each loop with gradient; below 1, gradients are those of a damped fixed-point
            iteration ("phantom gradients", Geng et al. 2021, arXiv:2111.05177).
        recompute: keep only each loop's first state, and compute it again in the backward pass. On a CPU free memory
            is given back to the system as well.

    Yields:
        One :class:`Stage` a loop in which any sequence has gradient, in order.
    """
    everyone = torch.arange(len(e))
    last, first = n_loops.tolist(), (n_loops - n_grad).tolist()
    assert min(last) >= 1 and int(n_grad.min()) >= 1

    def step(h: Tensor, rows: Tensor, loop: int) -> Tensor:
        return model.recurrent.step(h, take(e, rows), loop, *rows_of(freqs, mask, rows))

    for loop in range(max(last)):
        quiet = everyone[[loop < start for start in first]]
        loud = everyone[[start <= loop < end for start, end in zip(first, last, strict=True)]]
        if len(quiet):
            with torch.no_grad():
                after = step(take(h, quiet), quiet, loop)
            h = _put(h, quiet, after)  # with gradient: the other rows' graphs go on
        if len(loud):
            before = take(h, loud)
            if recompute:
                started = before if loop % _GIVE_BACK else give_back_here(before)
                after = checkpoint(step, started, loud, loop, use_reentrant=False)
                if loop == max(last) - 1:  # behind it come logits, larger than all else
                    after = give_back_here(after)
            else:
                after = step(before, loud, loop)
            if damping < 1:
                after = before + damping * (after - before)
            h = _put(h, loud, after)
            yield Stage(loud, before, after, n_loops[loud] - 1 - loop)


def rows_of(freqs: Tensor, mask: CausalMask, rows: Tensor) -> tuple[Tensor, CausalMask]:
    """Phasors and mask of some sequences of the batch."""
    if mask.is_same_for_all or len(rows) == len(freqs):
        return freqs, mask
    rows = rows.to(freqs.device, non_blocking=True)
    return freqs[rows], mask.rows(rows)


def take(x: Tensor, rows: Tensor) -> Tensor:
    """Some rows of ``x``, in order, or itself; ``rows`` (R,) int64 may be on the CPU, and nothing waits for a GPU."""
    return x if len(rows) == len(x) else x[rows.to(x.device, non_blocking=True)]


def _put(x: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    return new if len(rows) == len(x) else x.index_copy(0, rows.to(x.device, non_blocking=True), new.to(x.dtype))
