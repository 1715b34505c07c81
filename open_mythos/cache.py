"""Key/value caches: one slot for each layer of prelude and coda and for each loop of the recurrent block."""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from open_mythos.fields import must

PADDING_SLOT = "padding"
"""Slot of a plain-dict cache that holds which cached tokens are real; present only if some are padding."""

LOOPS_SLOT = "recurrent_loops"
"""The one slot of all loops of a layer of the recurrent block, in a cache whose rows stand at different ones."""


def prelude_slot(layer: int) -> str:
    return f"prelude_{layer}"


def loop_slot(loop: int, cache: Cache | None = None) -> str:
    """The slot that a loop writes and reads; a ``cache`` of fewer slots than loops uses them in turn."""
    n_slots = cache.cache_loops if cache is not None else None
    return _loop_slot(loop if n_slots is None else loop % n_slots)


@functools.cache
def _loop_slot(i: int) -> str:
    return f"recurrent_loop_{i}"


@functools.cache
def core_slot(loop: str, layer: int) -> str:
    """The slot of one layer of the recurrent block, from that of the loop, which the first layer keeps as it is."""
    return f"{loop}_layer_{layer}" if layer else loop


def coda_slot(layer: int, loop: int | None = None) -> str:
    """The slot of a coda layer; with ``loop``, of what it made of the states after that loop, for an exit to read."""
    return f"coda_{layer}" if loop is None else f"coda_{layer}_loop_{loop}"


class CacheSlot:
    """Rows of one layer (or loop), in buffers that double when they are full and are written in place.

    The slot of a loop that the newest tokens did not need holds what the slot before it got (:meth:`repeat`). Nothing
    is copied before some token comes that deep, and then all at once.
    """

    def __init__(self, room: int = 0) -> None:
        self.length, self._room = 0, room
        self._written = 0  # tokens whose rows are in the buffers; those after them are in the slot before
        self._before: CacheSlot | None = None
        self._buffers: dict[str, Tensor] = {}
        self._place: tuple[int, int, int, int] | None = None  # of the buffers, once somebody has asked

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_place": None}  # a copy's buffers are elsewhere

    @property
    def rows(self) -> dict[str, Tensor]:
        """The used part of each buffer, (B, length, ...), as views."""
        self._catch_up()
        return {name: buffer[:, : self.length] for name, buffer in self._buffers.items()}

    @property
    def batch_size(self) -> int:
        """Rows of the batch; 0 if nothing has been written."""
        return next((len(buffer) for buffer in self._buffers.values()), 0)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows written."""
        return sum(buffer[:, : self._written].nbytes for buffer in self._buffers.values())

    def update(self, new: dict[str, Tensor], at: int | None = None) -> dict[str, Tensor]:
        """Write ``new`` rows, (B, T, ...) each, and return all rows, (B, length, ...).

        They stand at position ``at``, behind all others if None; what the slot held from there on is given up.
        """
        start = self._open(self.length if at is None else at)
        self._write(new)
        self.length = self._written
        if torch.is_grad_enabled() and any(rows.requires_grad for rows in new.values()):
            # Autograd must not meet buffers that later tokens overwrite.
            return {
                name: torch.cat([self._buffers[name][:, :start].clone(), rows], 1) if start else rows
                for name, rows in new.items()
            }
        return self.rows

    def repeat(self, before: CacheSlot) -> None:
        """Hold from here on what ``before`` holds, the slot of the loop before, always the same one."""
        self._before, self.length = before, before.length

    def truncate(self, length: int) -> None:
        """Forget all tokens after the first ``length``."""
        self.length, self._written = min(self.length, length), min(self._written, length)

    def _open(self, at: int) -> int:
        """Give up what is held from ``at`` on, and have all before it written, so that new rows can follow."""
        assert 0 <= at <= self.length, f"rows at {at} would leave a hole behind the {self.length} held"
        self.truncate(at)
        self._catch_up()
        return at

    def _catch_up(self) -> None:
        if self._written == self.length:
            return
        chain = [self]
        while chain[-1]._written < self.length:
            assert chain[-1]._before is not None, "what is not written is held by the slot before"
            chain.append(chain[-1]._before)
        for before, slot in pairwise(reversed(chain)):
            slot._write({name: buffer[:, slot._written : self.length] for name, buffer in before._buffers.items()})

    def _write(self, new: dict[str, Tensor]) -> None:
        start, end = self._written, self._written + next(iter(new.values())).shape[1]
        for name, rows in new.items():
            self._reserve(name, rows, end)
            self._buffers[name][:, start:end] = rows.detach()
        self._written = end

    def open_row(self, at: int) -> tuple[int, int, int, int]:
        """Count a row at position ``at``, for compiled code to write; what the slot held from there on is given up.

        Returns the addresses of both buffers, each (B, room, D) or (B, G, room, D) in one piece, and their room and B.
        """
        if self._place is None or not self._written == self.length == at < self._place[2]:
            self._open(at)
            for name, buffer in list(self._buffers.items()):
                self._reserve(name, buffer, at + 1)
            first, second = self._buffers.values()
            self._place = first.data_ptr(), second.data_ptr(), first.shape[1], len(first)
        self.length = self._written = at + 1
        return self._place

    def _reserve(self, name: str, like: Tensor, length: int) -> None:
        buffer = self._buffers.get(name)
        if buffer is not None and buffer.shape[1] >= length:
            return
        capacity = max(length, self._room if buffer is None else 2 * buffer.shape[1])
        B, _, *heads, D = like.shape
        # A head's rows lie together: that is how attention reads them.
        grown = torch.empty(B, *heads, capacity, D, dtype=like.dtype, device=like.device).movedim(-2, 1)
        if buffer is not None:
            grown[:, : self._written] = buffer[:, : self._written]
        self._buffers[name], self._place = grown, None


class KVCache:
    """The cache to use: ``model(ids, kv_cache=cache)`` appends to it, any number of tokens at a time.

    It knows its length and its size, and can be cut back (:meth:`truncate`) or emptied (:meth:`reset`).

    Args:
        cache_loops: slots for the loops of the recurrent block, at least 1; one for each loop if None. With k of them,
            loop t writes and reads slot ``t mod k`` (Huginn, arXiv:2502.05171): for tokens of the same call it finds
            what it wrote itself, and for earlier ones what the deepest of the loops that share the slot has left.
            Memory no longer grows with the loops, and logits come to depend on how the tokens were divided into
            calls. Predictions that an exit reads are kept for every loop all the same.

        room: tokens to make room for from the start; a cache that gets more doubles.

    Raises:
        ValueError: for a ``cache_loops`` below 1.
    """

    def __init__(self, cache_loops: int | None = None, room: int = 0) -> None:
        if cache_loops is not None:
            whole = isinstance(cache_loops, int) and not isinstance(cache_loops, bool)
            must(whole and cache_loops >= 1, f"cache_loops={cache_loops!r}; use a whole number of at least 1, or None")
        self.cache_loops, self._room = cache_loops, room
        self._slots: dict[str, CacheSlot] = {}
        self.valid: Tensor | None = None  # (B, length) bool, False at padding; None while there is none

    @property
    def length(self) -> int:
        """Tokens held."""
        return max((slot.length for slot in self._slots.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use; loops that no token has needed yet take none."""
        return sum(slot.nbytes for slot in self._slots.values())

    def slot(self, name: str) -> CacheSlot:
        """The slot called ``name``, made empty if it is new."""
        if name not in self._slots:
            self._slots[name] = CacheSlot(self._room)
        return self._slots[name]

    def slot_length(self, name: str) -> int:
        """Tokens held by one slot; 0 if there is none of that name."""
        return self._slots[name].length if name in self._slots else 0

    def lengths(self) -> dict[str, int]:
        """Tokens held by each slot."""
        return {name: slot.length for name, slot in self._slots.items()}

    @property
    def batch_size(self) -> int:
        """Rows of the batch it holds; 0 if empty."""
        return next((slot.batch_size for slot in self._slots.values() if slot.batch_size), 0)

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
            slot.truncate(length)
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
    def length(self) -> int:
        return next(iter(self.rows.values())).shape[1] if self._name in self._cache else 0

    @property
    def rows(self) -> dict[str, Tensor]:
        return self._cache[self._name]

    def update(self, new: dict[str, Tensor], at: int | None = None) -> dict[str, Tensor]:
        old = self._cache.get(self._name)
        rows = new if old is None else {name: torch.cat([old[name], rows], 1) for name, rows in new.items()}
        self._cache[self._name] = rows
        return rows

    def repeat(self, before: _DictSlot) -> None:
        start = self.length
        self.update({name: rows[:, start:] for name, rows in before.rows.items()})


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
        return self.slot(name).length

    def lengths(self) -> dict[str, int]:
        return {name: next(iter(rows.values())).shape[1] for name, rows in self._data.items() if name != PADDING_SLOT}


Cache = KVCache | DictCache


def stand_in(cache: Cache, loop: int, n_loops: int, past: int, n_layers: int = 1) -> None:
    """Let what tokens after ``past`` wrote at ``loop``, their last, stand for the loops behind it, in every layer."""
    for layer in range(n_layers):
        slots = [core_slot(loop_slot(idle, cache), layer) for idle in range(loop, n_loops)]
        if cache.cache_loops is None:
            repeat_rows(cache, slots, past)
            continue
        # Loops share slots, so what deeper ones would have written takes the place of what is there.
        new = {name: rows[:, past:] for name, rows in cache.slot(slots[0]).rows.items()}
        for name in set(slots) - {slots[0]}:
            cache.slot(name).update(new, past)


def repeat_rows(cache: Cache, names: list[str], past: int) -> None:
    """Give each of the slots ``names`` that got nothing after ``past`` tokens what the slot before it got.

    They are those of loops that no position needed any more: what there was to read did not change from then on.
    """
    before: Any = cache.slot(names[0])
    for name in names[1:]:
        slot: Any = cache.slot(name)  # of the same kind
        if slot.length <= past:
            slot.repeat(before)
        before = slot


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
