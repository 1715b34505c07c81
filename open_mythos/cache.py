"""Key/value caches: one slot for each layer of prelude and coda, and for each layer and loop of the recurrent block.

A *row* is what attention reads of one token: (groups, width), with keys and values of GQA, or the latent and the rotary
key of MLA, next to each other. Rows have passed the short convolution and are final. Of *raw* rows, which have not,
the last few are kept as well, for the convolution of the tokens that follow.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from open_mythos.arguments import checked
from open_mythos.fields import must
from open_mythos.ops.attention import ends_in_padding

ROLLBACK = 64
"""Tokens that a cache can be truncated by and still be appended to: raw rows further back are not kept."""


class Slot(NamedTuple):
    """The layer that writes: one of the prelude, of the core (the recurrent block, at a loop) or of the coda.

    A coda layer has a slot for each loop as well, for exits that read predictions after every loop.
    """

    part: str
    layer: int = 0
    loop: int | None = None

    @property
    def name(self) -> str:
        """Key in plain dicts: ``prelude_0``, ``recurrent_loop_2``, ``recurrent_loop_2_layer_1``, ``coda_0``."""
        if self.part == "core":
            return f"recurrent_loop_{self.loop}" + (f"_layer_{self.layer}" if self.layer else "")
        return f"{self.part}_{self.layer}" + ("" if self.loop is None else f"_loop_{self.loop}")


def slot_name(slot: Slot | str) -> str:
    return slot if isinstance(slot, str) else slot.name


class CacheSlot:
    """Rows of one layer (and loop), (B, length, G, W), in a buffer that doubles when it is full, written in place.

    If the newest tokens skipped a loop, its slot takes over their rows from the previous loop's slot (:meth:`repeat`).
    The copy is put off until a token runs that loop, and then made all at once.
    """

    def __init__(self, room: int = 0) -> None:
        self.length, self._room = 0, room
        self._written = 0  # tokens whose rows are in the buffer; rows of later ones are in the previous loop's slot
        self._before: CacheSlot | None = None
        self._rows: Tensor | None = None
        self._raw: Tensor | None = None  # (B, R, G, W), a ring: position p is at p % R
        self._raw_start = 0  # the first position that the ring still holds
        self._base: tuple[int, Tensor] | None = None  # start of the newest rows, and the raw rows before it
        self._addresses: tuple[int, int, int, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_addresses": None}  # a copy has other buffers

    @property
    def rows(self) -> Tensor:
        """(B, length, G, W), a view."""
        self._catch_up()
        assert self._rows is not None, "the slot has been written"
        return self._rows[:, : self.length]

    @property
    def batch_size(self) -> int:
        """Rows of the batch; 0 if nothing has been written."""
        return 0 if self._rows is None else len(self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows written."""
        return 0 if self._rows is None else self._rows[:, : self._written].nbytes

    def raw_before(self, at: int, n: int) -> Tensor | None:
        """The ``n`` raw rows before position ``at``, (B, n, G, W), zero before the first token; None if ``at`` is 0.

        Raises:
            ValueError: if they are not held any more, since the cache was truncated by more than ``ROLLBACK``.
        """
        if at == 0 or n == 0:
            return None
        if self._base is not None and self._base[0] == at:
            return self._base[1]
        self._catch_up()
        assert self._raw is not None
        ring, start = self._raw.shape[1], self._first_raw(at, n)
        first, end = start % ring, (at - 1) % ring + 1
        parts = [self._raw[:, first:end]] if first < end else [self._raw[:, first:], self._raw[:, :end]]
        if at < n:
            parts.insert(0, torch.zeros_like(self._raw[:, : n - at]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _first_raw(self, at: int, n: int) -> int:
        """Position of the first of the ``n`` raw rows before ``at``; ValueError if they are not held."""
        assert self._raw is not None
        start = max(at - n, 0)
        if start < self._raw_start or at - start > self._raw.shape[1]:
            raise ValueError(
                f"the cache was truncated to {at} tokens, but convolution inputs are kept only from "
                f"{self._raw_start} on; truncate by at most {ROLLBACK} tokens, or start a new cache"
            )
        return start

    def update(self, rows: Tensor, raw: Tensor | None = None, at: int | None = None, n_raw: int = 0) -> Tensor:
        """Write ``rows`` (B, T, G, W) and return all rows, (B, length, G, W).

        Args:
            rows: final rows, after the convolution.
            raw: the same before the convolution; None without one.
            at: position of the first, behind all others if None; what the slot held from there on is dropped.
            n_raw: how many raw rows before its own a token's convolution reads.
        """
        start = self.length if at is None else at
        base = None
        if raw is not None and raw.shape[1] > ROLLBACK:  # overwrites rows that the next line reads
            before = self.raw_before(start, n_raw)
            base = None if before is None else (start, before.clone())
        self._base = base
        self._open(start)
        self._write(rows, raw, n_raw)
        self.length = self._written
        if rows.requires_grad:  # autograd must not meet a buffer that later tokens overwrite
            assert self._rows is not None
            return torch.cat([self._rows[:, :start].clone(), rows], 1) if start else rows
        return self.rows

    def repeat(self, before: CacheSlot) -> None:
        """Take over rows after the current length from ``before``, the previous loop's slot, always the same one."""
        self._before, self.length = before, before.length

    def truncate(self, length: int) -> None:
        """Forget all tokens after the first ``length``."""
        if length < self.length:
            self._base = None
        self.length, self._written = min(self.length, length), min(self._written, length)

    def snapshot(self, n_new: int) -> dict[str, Any]:
        """The state for :meth:`put_back`. Rows are only appended, but raw rows overwrite old ones and are copied."""
        return vars(self) | ({"_raw": self._raw.clone()} if n_new > ROLLBACK and self._raw is not None else {})

    def put_back(self, state: dict[str, Any], end: int) -> None:
        """Return to ``state``, after tokens up to position ``end`` may have been written."""
        is_same, self.__dict__ = state["_raw"] is self._raw, state | {"_addresses": None}
        if is_same and self._raw is not None:
            self._raw_start = max(self._raw_start, end - self._raw.shape[1])

    def _open(self, at: int) -> None:
        """Drop what is held from ``at`` on, and write out all before it, so that new rows can be appended."""
        assert 0 <= at <= self.length, f"rows at {at} would leave a hole behind the {self.length} held"
        self.length, self._written = min(self.length, at), min(self._written, at)
        self._catch_up()

    def _catch_up(self) -> None:
        if self._written == self.length:
            return
        chain = [self]
        while chain[-1]._written < self.length:
            assert chain[-1]._before is not None, "what is not written is held by the slot before"
            chain.append(chain[-1]._before)
        for before, slot in pairwise(reversed(chain)):
            assert before._rows is not None
            start, raw, n_raw = slot._written, None, 0
            if before._raw is not None:
                n_raw = before._raw.shape[1] - ROLLBACK
                if before._base is not None and before._base[0] == self.length:  # its ring holds later rows only
                    raw = before._base[1][:, -min(n_raw, self.length - start) :]
                else:
                    first = max(start, before._raw_start, self.length - before._raw.shape[1])
                    raw = before.raw_before(self.length, self.length - first)
            slot._write(before._rows[:, start : self.length], raw, n_raw)

    def _write(self, rows: Tensor, raw: Tensor | None, n_raw: int) -> None:
        """Append rows; ``raw`` may cover only the last of them."""
        start, end = self._written, self._written + rows.shape[1]
        self._reserve(rows, end)
        assert self._rows is not None
        self._rows[:, start:end] = rows.detach()
        self._written = end
        if raw is not None:
            self._write_raw(raw.detach(), end, n_raw)

    def _write_raw(self, raw: Tensor, end: int, n_raw: int) -> None:
        ring = ROLLBACK + n_raw
        if self._raw is None or len(self._raw) != len(raw):
            B, _, G, W = raw.shape
            self._raw, self._raw_start, self._addresses = raw.new_empty(B, ring, G, W), end - raw.shape[1], None
        raw = raw[:, -ring:]
        start = end - raw.shape[1]
        if self._raw_start > start or raw.shape[1] == ring:
            self._raw_start = start
        self._raw_start = max(self._raw_start, end - ring)
        first, split = start % ring, min(raw.shape[1], ring - start % ring)
        self._raw[:, first : first + split] = raw[:, :split]
        if split < raw.shape[1]:
            self._raw[:, : raw.shape[1] - split] = raw[:, split:]

    def addresses(self, at: int) -> tuple[int, int, int, int]:
        """Prepare position ``at`` to be written by the native engine; what the slot held from there on is dropped.

        Returns:
            The addresses of the rows (B, G, room, W) and of the ring of raw rows (B, R, G, W), 0 without one; room, B.
        """
        if self._addresses is None or not self._written == self.length == at < self._addresses[2]:
            self._open(at)
            assert self._rows is not None
            self._reserve(self._rows, at + 1)
            raw = 0 if self._raw is None else self._raw.data_ptr()
            self._addresses = self._rows.data_ptr(), raw, self._rows.shape[1], len(self._rows)
        if self._raw is not None:
            self._first_raw(at, self._raw.shape[1] - ROLLBACK)  # raises if they are not held
            self._raw_start = max(self._raw_start, at + 1 - self._raw.shape[1])
        self._base = None
        self.length = self._written = at + 1
        return self._addresses

    def _reserve(self, like: Tensor, length: int) -> None:
        if self._rows is not None and self._rows.shape[1] >= length:
            return
        capacity = max(length, self._room if self._rows is None else 2 * self._rows.shape[1])
        B, _, G, W = like.shape
        # The rows of a head are contiguous, as attention reads them.
        grown = torch.empty(B, G, capacity, W, dtype=like.dtype, device=like.device).transpose(1, 2)
        if self._rows is not None:
            grown[:, : self._written] = self._rows[:, : self._written]
        self._rows, self._addresses = grown, None


class Cache:
    """Interface of what layers write rows to and read rows from."""

    cache_loops: int | None = None
    valid: Tensor | None  # (B, length) bool, False at padding; None while there is none
    ends_in_padding = False  # what the function of this name says of the last call's mask

    @property
    def length(self) -> int:
        """Tokens held."""
        return max(self.lengths().values(), default=0)

    @property
    def batch_size(self) -> int:
        """Rows of the batch it holds; 0 if empty."""
        raise NotImplementedError

    def slot(self, slot: Slot | str) -> Any:
        """The rows of a slot, made empty if it is new; see :class:`CacheSlot`."""
        raise NotImplementedError

    def slot_length(self, slot: Slot | str) -> int:
        """Tokens held by one slot."""
        return self.slot(slot).length

    def lengths(self) -> dict[str, int]:
        """Tokens held by each slot."""
        raise NotImplementedError

    def snapshot(self, n_new: int) -> Callable[[], None]:
        """A function that restores the cache as it is now, after up to ``n_new`` tokens were appended, even in part."""
        return lambda: None

    def open(self, slot: Slot | str, at: int, n_raw: int) -> tuple[Any, Tensor | None]:
        """A slot, and the ``n_raw`` raw rows that it holds before position ``at``; see :meth:`CacheSlot.raw_before`."""
        held = self.slot(slot)
        return held, held.raw_before(at, n_raw)


class KVCache(Cache):
    """The cache to use: ``model(ids, kv_cache=cache)`` appends to it, any number of tokens at a time.

    It knows its length and its size, and can be cut back (:meth:`truncate`) or emptied (:meth:`reset`).

    Args:
        cache_loops: slots for the loops of the recurrent block, at least 1; one for each loop if None. With k of them,
            loop t writes and reads slot ``t mod k`` (Huginn, arXiv:2502.05171): for tokens of the same call it finds
            what it wrote itself, and for earlier ones what the deepest of the loops that share the slot has left.
            Memory no longer grows with the loops, and logits come to depend on how the tokens were divided into
            calls. The coda's rows, for an exit that reads predictions, are still kept for every loop.
        room: tokens to allocate at the start; the buffers double when they are full.

    Raises:
        ValueError: for a ``cache_loops`` below 1.
    """

    @checked
    def __init__(self, cache_loops: int | None = None, room: int = 0) -> None:
        most = cache_loops is None or cache_loops >= 1
        must(most, f"cache_loops={cache_loops!r}; use a whole number of at least 1, or None")
        must(room >= 0, f"room={room}; use 0 or more tokens")
        self.cache_loops, self._room = cache_loops, room
        self._slots: dict[Slot | str, CacheSlot] = {}
        self.valid = None

    @property
    def length(self) -> int:
        return max((slot.length for slot in self._slots.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use; loops that no token has needed yet take none, and raw rows are not counted."""
        return sum(slot.nbytes for slot in self._slots.values())

    def slot(self, slot: Slot | str) -> CacheSlot:
        if slot not in self._slots:
            self._slots[slot] = CacheSlot(self._room)
        return self._slots[slot]

    def slot_length(self, slot: Slot | str) -> int:
        return self._slots[slot].length if slot in self._slots else 0

    def lengths(self) -> dict[str, int]:
        return {slot_name(slot): held.length for slot, held in self._slots.items()}

    @property
    def batch_size(self) -> int:
        return next((slot.batch_size for slot in self._slots.values() if slot.batch_size), 0)

    @checked
    def truncate(self, length: int) -> None:
        """Forget all tokens after the first ``length``.

        After a cut by more than ``ROLLBACK`` tokens, a model with a convolution raises an error when it is called.

        Raises:
            ValueError: if the cache holds fewer.
        """
        if not 0 <= length <= self.length:
            raise ValueError(
                f"cannot truncate a cache of {self.length} tokens to {length}; use a length of 0 to {self.length}"
            )
        if length == 0:
            return self.reset()
        for slot in self._slots.values():
            slot.truncate(length)
        if self.valid is not None:
            self.valid = self.valid[:, :length]
            self.ends_in_padding = self.ends_in_padding and ends_in_padding(self.valid)

    def snapshot(self, n_new: int) -> Callable[[], None]:
        slots, end = {slot: held.snapshot(n_new) for slot, held in self._slots.items()}, self.length
        valid, ends_in_padding = self.valid, self.ends_in_padding

        def put_back() -> None:
            self.valid, self.ends_in_padding = valid, ends_in_padding
            for slot in self._slots.keys() - slots.keys():
                del self._slots[slot]
            for slot, state in slots.items():
                self._slots[slot].put_back(state, end + n_new)

        return put_back

    def reset(self) -> None:
        """Forget everything."""
        self._slots.clear()
        self.valid, self.ends_in_padding = None, False
        vars(self).pop("_call", None)


def loop_slot(loop: int, cache: Cache | None = None, layer: int = 0) -> Slot:
    """The slot that a layer of the core writes and reads at a loop; with fewer slots than loops, used in turn."""
    n_slots = cache.cache_loops if cache is not None else None
    return Slot("core", layer, loop if n_slots is None else loop % n_slots)


def fill_skipped_loops(cache: Cache, loop: int, n_loops: int, past: int, n_layers: int = 1) -> None:
    """Reuse the rows that tokens after ``past`` wrote at ``loop``, their last, for all later loops, in every layer."""
    for layer in range(n_layers):
        slots = [loop_slot(idle, cache, layer) for idle in range(loop, n_loops)]
        if cache.cache_loops is None:
            repeat_rows(cache, slots, past)
            continue
        # Loops share slots: overwrite those that the skipped, deeper loops would have overwritten.
        last: Any = cache.slot(slots[0])
        n_new = last.length - past
        for slot in set(slots) - {slots[0]}:
            n_raw = 0 if last._raw is None else last._raw.shape[1] - ROLLBACK
            raw = last.raw_before(last.length, min(n_new, ROLLBACK + n_raw)) if n_raw else None
            cache.slot(slot).update(last.rows[:, past:], raw, past, n_raw)


def repeat_rows(cache: Cache, slots: list[Slot], past: int) -> None:
    """Let each of ``slots`` that got no rows after ``past`` tokens take over those of the slot before it.

    These are slots of loops that no position ran, as all had halted: the rows to read no longer changed.
    """
    before: Any = cache.slot(slots[0])
    for slot in slots[1:]:
        held: Any = cache.slot(slot)  # of the same kind
        if held.length <= past:
            held.repeat(before)
        before = held
