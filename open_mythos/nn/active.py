"""Running loops on the positions that still run, when others have halted."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from open_mythos.context import Context
from open_mythos.ops.attention import AttentionMask

# If STAY times the width of the packed queries is above T, attention with all T queries is faster: packed ones need a
# bias of their own and read keys beyond the window. Problems of 512 tokens then take 2/3 of the CPU time, at 2 to 16.
STAY = 3


class ActiveTokens:
    """Bookkeeping for running one block on some of the (B, T) positions of a batch.

    Where positions are *packed*, position-wise work is done on the N running ones as one (1, N, ...) sequence; for
    attention the queries are packed to the front of each row, (B, width, ...), width being the most that still run in
    any row. Otherwise, as on a GPU, which the host would have to wait for, all positions are computed at fixed shapes.
    A halted position keeps the key/value rows of its last loop. While all run, methods return their argument unchanged.

    Args:
        running: (B, T) bool.
        packs: whether positions are packed.
        rows: raw and final key/value rows of the previous loop for each layer of the block, (B, T, ...) each; empty at
            the first loop, which all positions run.
    """

    def __init__(self, running: Tensor, packs: bool, rows: dict[Any, tuple[Tensor, Tensor]] | None = None) -> None:
        self.running, self.packs = running, packs
        self.rows = rows or {}

    def only(self, running: Tensor) -> ActiveTokens:
        """The subset ``running`` of these positions, with the rows of the loop just run."""
        still = ActiveTokens(running, self.packs, self.rows)
        return self if self.packs and len(still) == len(self) else still

    @cached_property
    def _n(self) -> int:
        return int(self.running.sum())

    def __len__(self) -> int:
        return self._n

    @cached_property
    def _at(self) -> tuple[Tensor, Tensor]:
        """Row and column of each running position."""
        row, col = self.running.nonzero(as_tuple=True)
        return row, col

    @cached_property
    def _packed_at(self) -> tuple[Tensor, Tensor]:
        """Row of each running position, and its index among the running ones of that row."""
        row, col = self._at
        return row, (self.running.cumsum(1) - 1)[row, col]

    @cached_property
    def width(self) -> int:
        """Most positions that still run in any row of the batch."""
        return int(self.running.sum(1).max())

    @property
    def is_packed(self) -> bool:
        """Whether some positions are left out."""
        return self.packs and len(self) < self.running.numel()

    def gather(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (1, N, ...)."""
        return x[self._at].unsqueeze(0) if self.is_packed else x

    def scatter(self, new: Tensor, into: Tensor) -> Tensor:
        """``into`` (B, T, ...) with the running positions replaced by ``new`` (1, N, ...)."""
        if self.is_packed:
            return into.index_put(self._at, new[0].to(into.dtype))
        if self.packs:
            return new
        return torch.where(self.running.view(*self.running.shape, *[1] * (new.ndim - 2)), new, into)

    @cached_property
    def queries_stay(self) -> bool:
        """Whether queries stay at their places, as so many run that attention with all T of them is faster.

        All T queries share one mask in every loop, which is built once or known to the kernels, and windowed keys.
        """
        return STAY * self.width > self.running.shape[1]

    def pack(self, x: Tensor) -> Tensor:
        """(1, N, ...) -> (B, width, ...), padded with zeros; or (B, T, ...), zeros where positions have halted."""
        if not self.is_packed:
            return x
        if self.queries_stay:
            return self.scatter(x, into=x.new_zeros(*self.running.shape, *x.shape[2:]))
        packed = x.new_zeros(len(self.running), self.width, *x.shape[2:])
        return packed.index_put(self._packed_at, x[0])

    def unpack(self, packed: Tensor) -> Tensor:
        """The inverse of :meth:`pack`: -> (1, N, ...)."""
        if not self.is_packed:
            return packed
        return self.gather(packed) if self.queries_stay else packed[self._packed_at].unsqueeze(0)

    def merge_raw(self, layer: Any, raw: Tensor) -> Tensor:
        """Raw rows of all (B, T) positions: ``raw`` (1, N, ...) where they run, the previous loop's elsewhere."""
        return self.scatter(raw, self.rows[layer][0]) if layer in self.rows else raw

    def merge(self, layer: Any, raw: Tensor, rows: Tensor) -> Tensor:
        """Final rows (B, T, ...), merged likewise: a halted position's do not change with those of its neighbours."""
        if layer in self.rows and (self.is_packed or not self.packs):
            running = self.running.view(*self.running.shape, *[1] * (rows.ndim - 2))
            rows = torch.where(running, rows, self.rows[layer][1])
        self.rows[layer] = raw, rows
        return rows

    def context(self, whole: Context) -> Context:
        """The context of the running positions, given ``whole``, that of all T positions of the batch."""
        if not self.is_packed:
            return replace(whole, active=self)
        mask = whole.mask
        assert isinstance(mask, AttentionMask)
        n_rows, rotary = len(self.running), whole.rotary
        n_axes = 2 if rotary.is_complex() else 3
        rotary = rotary.expand(n_rows, *rotary.shape[-n_axes:])
        if not self.queries_stay:
            positions = self.pack((self._at[1] + mask.first).unsqueeze(0))
            mask = replace(mask, n_queries=self.width, positions=positions, first=mask.first)
        return replace(whole, rotary=self.gather(rotary), mask=mask, active=self)
