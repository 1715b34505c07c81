"""Who may look at whom.

Shape letters: B rows, T queries, S keys, W window.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 32  # queries that local attention takes together


@dataclass
class CausalMask:
    """Who may look at whom: a query sees every key of its document up to its own position, except padding.

    Args:
        n_queries: T.
        n_keys: S; query i stands at key position ``S - T + i`` unless ``positions`` says otherwise.
        valid: (B, S) bool, False at padding; None if there is none. A padding query sees itself, so that no
            softmax is over nothing.
        positions: (B, T) key position of each query, for queries that are not the last T tokens in order.
        first: position of the first new token, from which on queries stand; ``S - T`` if None.
        starts: (B, S) int64 position at which the document of each key starts, see :func:`document_starts`; None if a
            row is one document.
        window: a query sees the last so many keys alone, its own included; None if all.
    """

    n_queries: int
    n_keys: int
    valid: Tensor | None = None
    positions: Tensor | None = None
    first: int | None = None
    starts: Tensor | None = None
    window: int | None = None
    _dense: Tensor | None = field(default=None, init=False, repr=False)
    _bands: dict[tuple[int, int, torch.device], Tensor] = field(default_factory=dict, init=False, repr=False)
    _near: dict[tuple[int, int], CausalMask] = field(default_factory=dict, init=False, repr=False)

    def query_positions(self, device: torch.device) -> Tensor:
        """(B or 1, T)."""
        if self.positions is not None:
            return self.positions
        return torch.arange(self.n_keys - self.n_queries, self.n_keys, device=device).unsqueeze(0)

    @property
    def n_new(self) -> int:
        """Keys from the first that may be a query on."""
        return self.n_queries if self.first is None else self.n_keys - self.first

    def near(self, window: int, more: int) -> CausalMask:
        """For the same queries that see ``window`` keys alone: of the last keys those that any of them sees.

        And ``more`` keys before these, as far as there are any. Made once for all loops.
        """
        key = (window, more)
        if key not in self._near:
            cut = max(0, self.n_keys - self.n_new - window + 1 - more)
            self._near[key] = CausalMask(
                self.n_queries, self.n_keys - cut,
                None if self.valid is None else self.valid[:, cut:],
                None if self.positions is None else (self.positions - cut).clamp(min=0),  # of unused slots, anything
                None if self.first is None else self.first - cut,
                None if self.starts is None else self.starts[:, cut:] - cut,
                window,
            )  # fmt: skip
        return self._near[key]

    def ending(self, n_queries: int) -> CausalMask:
        """The mask of the last queries alone, which see the same keys; for queries that are the last T tokens."""
        assert self.positions is None and n_queries <= self.n_queries
        return CausalMask(n_queries, self.n_keys, self.valid, starts=self.starts)

    def rows(self, which: slice | Tensor) -> CausalMask:
        """The mask of some rows of the batch, for queries that are the last T tokens."""
        assert self.positions is None
        valid, starts = (None if x is None else x[which] for x in (self.valid, self.starts))
        return CausalMask(self.n_queries, self.n_keys, valid, first=self.first, starts=starts)

    @property
    def real(self) -> Tensor | None:
        """(B, S) bool of keys that a query may look at before its own; None if at all."""
        return self.valid

    @property
    def is_same_for_all(self) -> bool:
        """True where no row of the batch differs from another."""
        return self.valid is None and self.starts is None and self.positions is None

    @property
    def is_plain(self) -> bool:
        """True where SDPA needs no mask: all tokens are queries, or one query sees every key."""
        return self.is_same_for_all and self.window is None and self.n_queries in (1, self.n_keys)

    @property
    def is_last(self) -> bool:
        """True for one query that sees every key."""
        return self.n_queries == 1 and self.is_plain

    def dense(self, device: torch.device) -> Tensor:
        """(B or 1, 1, T, S) bool, True where a query may look; made once for all layers and loops that ask."""
        if torch.compiler.is_compiling():  # code that finds what other code left here is other code
            return self._make_dense(device)
        if self._dense is None or self._dense.device != device:
            self._dense = self._make_dense(device)
        return self._dense

    def _make_dense(self, device: torch.device) -> Tensor:
        at = self.query_positions(device).unsqueeze(-1)
        key = torch.arange(self.n_keys, device=device)
        seen = key <= at
        if self.window is not None:
            seen = seen & (key > at - self.window)
        if self.starts is not None:
            seen = seen & (key >= self.starts_at(self.query_positions(device)).unsqueeze(-1))
        if self.valid is not None:
            seen = seen & self.valid.unsqueeze(1) | (key == at)
        return seen.unsqueeze(1)

    def chunk(self, window: int) -> int:
        """How many queries local attention takes together: keys that not all of them see are what it wastes."""
        chunk = self.n_queries if self.n_queries < _CHUNK else _CHUNK  # not min and max, which compilers do not decide
        return chunk if chunk >= window - 1 else window - 1

    def chunked_band(self, window: int, B: int, device: torch.device) -> Tensor:
        """(B * chunks, 1, chunk, chunk + window - 1) bool: who sees whom in chunks; made once for all loops."""
        key = (window, B, device)
        if torch.compiler.is_compiling():
            return self._make_chunked_band(B, window, device)
        if key not in self._bands:
            self._bands[key] = self._make_chunked_band(B, window, device)
        return self._bands[key]

    def _make_chunked_band(self, B: int, window: int, device: torch.device) -> Tensor:
        chunk = self.chunk(window)
        n_chunks = -(-self.n_queries // chunk)
        at = torch.arange(chunk, device=device).unsqueeze(1)
        key = torch.arange(chunk + window - 1, device=device)
        near = (key >= at) & (key < at + window)  # query i stands at key i + window - 1
        position = torch.arange(n_chunks, device=device).unsqueeze(1) * chunk + key
        position = position + self.n_keys - self.n_queries - window + 1
        real = ((position >= 0) & (position < self.n_keys)).unsqueeze(0)
        if self.valid is not None:
            real = real & self.valid[:, position.clamp(0, self.n_keys - 1)]
        seen = near & real.unsqueeze(2)
        if self.starts is not None:
            queries = position[:, window - 1 :].clamp(0, self.n_keys - 1)
            seen = seen & (position.unsqueeze(1) >= self.starts[:, queries].unsqueeze(-1))
        seen = seen | (key == at + window - 1)  # (B or 1, chunks, chunk, chunk + window - 1)
        return seen.expand(B, -1, -1, -1).flatten(0, 1).unsqueeze(1)

    def starts_at(self, positions: Tensor) -> Tensor:
        """Where the documents of the keys at ``positions`` (B or 1, T) start: (B, T)."""
        assert self.starts is not None
        return self.starts.gather(1, positions.expand(len(self.starts), -1))

    def band(self, key_positions: Tensor) -> Tensor:
        """True where ``key_positions`` (B or 1, T, W) hold a key that the query may look at (itself always)."""
        seen = key_positions >= 0
        if self.starts is not None:
            seen = key_positions >= self.starts_at(key_positions[..., -1]).unsqueeze(-1)
        if self.valid is not None:
            B, T, W = self.valid.shape[0], *key_positions.shape[1:]
            at = key_positions.clamp(min=0).expand(B, T, W).flatten(1)
            seen = seen & self.valid.gather(1, at).view(B, T, W)
            seen[..., -1] = True
        return seen


def document_starts(numbers: Tensor) -> Tensor | None:
    """Where the document of each token starts: (B, T) int64; None where no row holds more than one.

    Args:
        numbers: (B, T), 0 at padding, neighbours of one document with the same number; (B, T) bool says nothing of
            documents.
    """
    if numbers.dtype == torch.bool or bool((numbers <= 1).all()):
        return None
    begins = F.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0), value=True)
    return (begins * torch.arange(numbers.shape[1], device=numbers.device)).cummax(1).values
