"""The positions that still run when others have halted."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from open_mythos.ops.mask import CausalMask


class ActiveTokens:
    """Bookkeeping for running one block on some of the (B, T) positions of a batch.

    Position-wise work is done on the N running positions as one (1, N, ...) sequence; for attention the queries
    are packed to the front of each row, (B, width, ...), width being the most that any row still runs. A halted
    position keeps the key and value rows of the last loop that it ran. While all positions run, every method hands
    back what it was given.

    Args:
        running: (B, T) bool.
        rows: key/value rows of the previous loop, (B, T, ...) each, for each layer of the block; empty at the first.

    Attributes:
        layer: the layer at work; where a block has several, it says which.
    """

    def __init__(self, running: Tensor, rows: dict[int, dict[str, Tensor]] | None = None) -> None:
        self.running = running
        self.rows = rows or {}
        self.layer = 0

    def only(self, running: Tensor) -> ActiveTokens:
        """Those of these positions that still run, with the rows of the loop that is over."""
        still = ActiveTokens(running, self.rows)
        return self if len(still) == len(self) else still

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
        """Row of each running position, and its place among those of the row."""
        row, col = self._at
        return row, (self.running.cumsum(1) - 1)[row, col]

    @cached_property
    def width(self) -> int:
        """Most positions that any row of the batch still runs."""
        return int(self.running.sum(1).max())

    @property
    def is_everything(self) -> bool:
        """Whether no position has halted."""
        return len(self) == self.running.numel()

    def gather(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (1, N, ...)."""
        if self.is_everything:
            return x
        return x[self._at].unsqueeze(0)

    def scatter(self, new: Tensor, into: Tensor) -> Tensor:
        """``into`` (B, T, ...) with the running positions replaced by ``new`` (1, N, ...)."""
        if self.is_everything:
            return new
        return into.index_put(self._at, new[0].to(into.dtype))

    def pack(self, x: Tensor) -> Tensor:
        """(1, N, ...) -> (B, width, ...), zeros behind each row's last."""
        if self.is_everything:
            return x
        packed = x.new_zeros(len(self.running), self.width, *x.shape[2:])
        return packed.index_put(self._packed_at, x[0])

    def unpack(self, packed: Tensor) -> Tensor:
        """(B, width, ...) -> (1, N, ...)."""
        if self.is_everything:
            return packed
        return packed[self._packed_at].unsqueeze(0)

    def mask(self, whole: CausalMask) -> CausalMask:
        """``whole``, the mask of all T positions of the batch, for the packed queries alone."""
        if self.is_everything:
            return whole
        first = whole.n_keys - whole.n_queries
        positions = self.pack((self._at[1] + first).unsqueeze(0))
        return CausalMask(self.width, whole.n_keys, whole.valid, positions, first, whole.starts)

    def merge(self, new: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rows of all (B, T) positions: ``new`` ones (1, N, ...) where they run, the previous loop's elsewhere."""
        if not self.is_everything:
            old = self.rows[self.layer]
            new = {name: self.scatter(rows, into=old[name]) for name, rows in new.items()}
        self.rows[self.layer] = new
        return new
