"""Key/value caches: one slot for each layer of prelude and coda and for each loop of the recurrent block."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from open_mythos.fields import must

PADDING_SLOT = "padding"
"""Slot of a plain-dict cache that holds which cached tokens are real; present only if some are padding."""


def prelude_slot(layer: int) -> str:
    return f"prelude_{layer}"


def loop_slot(loop: int, cache: Cache | None = None) -> str:
    """The slot that a loop writes and reads; a ``cache`` of fewer slots than loops uses them in turn."""
    n_slots = cache.cache_loops if cache is not None else None
    return f"recurrent_loop_{loop if n_slots is None else loop % n_slots}"


def coda_slot(layer: int, loop: int | None = None) -> str:
    """The slot of a coda layer; with ``loop``, of what it made of the states after that loop, for an exit to read."""
    return f"coda_{layer}" if loop is None else f"coda_{layer}_loop_{loop}"


class CacheSlot:
    """Rows of one layer (or loop), in buffers that double when they are full and are written in place."""

    def __init__(self) -> None:
        self.length = 0
        self._buffers: dict[str, Tensor] = {}

    @property
    def rows(self) -> dict[str, Tensor]:
        """The used part of each buffer, (B, length, ...), as views."""
        return {name: buffer[:, : self.length] for name, buffer in self._buffers.items()}

    def update(self, new: dict[str, Tensor], at: int | None = None) -> dict[str, Tensor]:
        """Write ``new`` rows, (B, T, ...) each, and return all rows, (B, length, ...).

        They stand at position ``at``, behind all others if None; what the slot held from there on is given up.
        """
        start = self.length = self.length if at is None else self._checked(at)
        end, past = start + next(iter(new.values())).shape[1], self.rows
        for name, rows in new.items():
            self._reserve(name, rows, end)
            self._buffers[name][:, start:end] = rows.detach()
        self.length = end
        if torch.is_grad_enabled() and any(rows.requires_grad for rows in new.values()):
            # Autograd must not meet buffers that later tokens overwrite.
            return {name: torch.cat([past[name].clone(), rows], 1) if start else rows for name, rows in new.items()}
        return self.rows

    def open_row(self, at: int, batch: int) -> tuple[int, int, int]:
        """Count a row at position ``at``, for compiled code to write; what the slot held from there on is given up.

        Returns the addresses of both buffers, each (B, room, ...) in one piece, and their room.
        """
        self.length = self._checked(at)
        for name, buffer in list(self._buffers.items()):
            self._reserve(name, buffer, at + 1)
        self.length = at + 1
        first, second = self._buffers.values()
        assert len(first) == len(second) == batch, f"{batch} rows for a cache of {len(first)}"
        return first.data_ptr(), second.data_ptr(), first.shape[1]

    def _checked(self, at: int) -> int:
        assert 0 <= at <= self.length, f"rows at {at} would leave a hole behind the {self.length} held"
        return at

    def _reserve(self, name: str, like: Tensor, length: int) -> None:
        buffer = self._buffers.get(name)
        if buffer is not None and buffer.shape[1] >= length:
            return
        capacity = length if buffer is None else max(length, 2 * buffer.shape[1])
        grown = torch.empty(like.shape[0], capacity, *like.shape[2:], dtype=like.dtype, device=like.device)
        if buffer is not None:
            grown[:, : self.length] = buffer[:, : self.length]
        self._buffers[name] = grown


class KVCache:
    """The cache to use: ``model(ids, kv_cache=cache)`` appends to it, any number of tokens at a time.

    It knows its length and its size, and can be cut back (:meth:`truncate`) or emptied (:meth:`reset`).

    Args:
        cache_loops: slots for the loops of the recurrent block, at least 1; one for each loop if None. With k of them,
            loop t writes and reads slot ``t mod k`` (Huginn, arXiv:2502.05171): for tokens of the same call it finds
            what it wrote itself, and for earlier ones what the deepest of the loops that share the slot has left.
            Memory no longer grows with the loops, and logits come to depend on how the tokens were divided into
            calls. Predictions that an exit reads are kept for every loop all the same.

    Raises:
        ValueError: for a ``cache_loops`` below 1.
    """

    def __init__(self, cache_loops: int | None = None) -> None:
        if cache_loops is not None:
            whole = isinstance(cache_loops, int) and not isinstance(cache_loops, bool)
            must(whole and cache_loops >= 1, f"cache_loops={cache_loops!r}; use a whole number of at least 1, or None")
        self.cache_loops = cache_loops
        self._slots: dict[str, CacheSlot] = {}
        self.valid: Tensor | None = None  # (B, length) bool, False at padding; None while there is none

    @property
    def length(self) -> int:
        """Tokens held."""
        return max((slot.length for slot in self._slots.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use."""
        return sum(t.numel() * t.element_size() for slot in self._slots.values() for t in slot.rows.values())

    def slot(self, name: str) -> CacheSlot:
        """The slot called ``name``, made empty if it is new."""
        return self._slots.setdefault(name, CacheSlot())

    def slot_length(self, name: str) -> int:
        """Tokens held by one slot; 0 if there is none of that name."""
        return self._slots[name].length if name in self._slots else 0

    def lengths(self) -> dict[str, int]:
        """Tokens held by each slot."""
        return {name: slot.length for name, slot in self._slots.items()}

    @property
    def batch_size(self) -> int:
        """Rows of the batch it holds; 0 if empty."""
        return max((len(t) for slot in self._slots.values() for t in slot.rows.values()), default=0)

    def truncate(self, length: int) -> None:
        """Forget all tokens after the first ``length``.

        Raises:
            ValueError: if the cache holds fewer.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot cut a cache of {self.length} tokens to {length}; use 0 to {self.length}")
        if length == 0:
            return self.reset()
        for slot in self._slots.values():
            slot.length = min(slot.length, length)
        if self.valid is not None:
            self.valid = self.valid[:, :length]

    def reset(self) -> None:
        """Forget everything."""
        self._slots.clear()
        self.valid = None


class _DictSlot:
    """A slot of a plain dict: each update replaces the tensors by longer ones.

    No two loops share one, so that new rows always stand behind the last, and ``at`` says nothing new.
    """

    def __init__(self, cache: dict[str, Any], name: str) -> None:
        self._cache, self._name = cache, name

    @property
    def rows(self) -> dict[str, Tensor]:
        return self._cache[self._name]

    def update(self, new: dict[str, Tensor], at: int | None = None) -> dict[str, Tensor]:
        old = self._cache.get(self._name)
        rows = new if old is None else {name: torch.cat([old[name], rows], 1) for name, rows in new.items()}
        self._cache[self._name] = rows
        return rows


class DictCache:
    """A plain dict, ``{slot: {name: tensor}}``, seen through the interface of :class:`KVCache`."""

    cache_loops = None

    def __init__(self, data: dict[str, Any]) -> None:
        self._data = data

    @property
    def length(self) -> int:
        return max(self.lengths().values(), default=0)

    @property
    def batch_size(self) -> int:
        return max((len(t) for rows in self._data.values() for t in rows.values()), default=0)

    @property
    def valid(self) -> Tensor | None:
        return self._data[PADDING_SLOT]["valid"] if PADDING_SLOT in self._data else None

    @valid.setter
    def valid(self, valid: Tensor | None) -> None:
        if valid is not None:
            self._data[PADDING_SLOT] = {"valid": valid}

    def slot(self, name: str) -> _DictSlot:
        return _DictSlot(self._data, name)

    def slot_length(self, name: str) -> int:
        return next(iter(self._data[name].values())).shape[1] if name in self._data else 0

    def lengths(self) -> dict[str, int]:
        return {name: next(iter(rows.values())).shape[1] for name, rows in self._data.items() if name != PADDING_SLOT}


Cache = KVCache | DictCache


def repeat_rows(cache: Cache, names: list[str], past: int) -> None:
    """Give each of the slots ``names`` that got nothing after ``past`` tokens what the slot before it got.

    They are those of loops that no position needed any more: what there was to read did not change from then on.
    """
    lengths = cache.lengths()
    for before, name in pairwise(names):
        if lengths.get(name, 0) <= past:
            cache.slot(name).update({key: rows[:, past:] for key, rows in cache.slot(before).rows.items()})


def as_cache(kv_cache: KVCache | DictCache | dict[str, Any] | None) -> Cache | None:
    """``kv_cache`` behind one interface; dicts are wrapped, not copied.

    Raises:
        ValueError: for anything else.
    """
    if kv_cache is None or isinstance(kv_cache, KVCache | DictCache):
        return kv_cache
    if isinstance(kv_cache, dict):
        return DictCache(kv_cache)
    raise ValueError(f"kv_cache is a {type(kv_cache).__name__}; pass a KVCache, a dict, or None")
