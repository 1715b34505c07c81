"""Plain dicts as caches, as in the public reference, ``model(ids, kv_cache={})``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from open_mythos.cache import Cache, Slot, slot_name
from open_mythos.fields import must
from open_mythos.ops.attention import ends_in_padding

Result = TypeVar("Result")
PADDING_SLOT = "padding"
"""Slot that holds which cached tokens are real; present only if some are padding."""
_RAW = "raw"  # the key, in a slot, of the last raw rows


class _DictSlot:
    """A slot of a plain dict: each update replaces the tensors by longer ones.

    Loops never share a slot of a dict, so new rows always follow the last one, and ``at`` is not needed.
    """

    def __init__(self, cache: dict[str, Any], name: str) -> None:
        self._cache, self._name = cache, name

    @property
    def length(self) -> int:
        return self._cache[self._name]["rows"].shape[1] if self._name in self._cache else 0

    @property
    def rows(self) -> Tensor:
        return self._cache[self._name]["rows"]

    def raw_before(self, at: int, n: int) -> Tensor | None:
        return self._cache[self._name][_RAW] if at and n else None

    def update(self, rows: Tensor, raw: Tensor | None = None, at: int | None = None, n_raw: int = 0) -> Tensor:
        old = self._cache.get(self._name)
        held = {"rows": rows if old is None else torch.cat([old["rows"], rows], 1)}
        if raw is not None:
            before = raw.new_zeros(len(raw), n_raw, *raw.shape[2:]) if old is None else old[_RAW]
            held[_RAW] = torch.cat([before, raw], 1)[:, raw.shape[1] :]
        self._cache[self._name] = held
        return held["rows"]

    def repeat(self, before: _DictSlot) -> None:
        theirs, start = self._cache[before._name], self.length
        rows, raw = theirs["rows"][:, start:], theirs.get(_RAW)
        if raw is None:
            self.update(rows)
        else:  # it keeps its own raw rows of earlier tokens
            self.update(rows, raw[:, -rows.shape[1] :], n_raw=raw.shape[1])


class DictCache(Cache):
    """A plain dict, ``{slot: {"rows": (B, length, G, W), "raw": (B, taps - 1, G, W)}}``, behind the interface of
    :class:`KVCache`."""

    def __init__(self, data: dict[str, Any]) -> None:
        self._data = data
        self.ends_in_padding = self.valid is not None and ends_in_padding(self.valid)

    @property
    def batch_size(self) -> int:
        return max((len(t) for held in self._data.values() for t in held.values()), default=0)

    @property
    def valid(self) -> Tensor | None:
        return self._data[PADDING_SLOT]["valid"] if PADDING_SLOT in self._data else None

    @valid.setter
    def valid(self, valid: Tensor | None) -> None:
        if valid is not None:
            self._data[PADDING_SLOT] = {"valid": valid}

    def slot(self, slot: Slot | str) -> _DictSlot:
        return _DictSlot(self._data, slot_name(slot))

    def snapshot(self, n_new: int) -> Callable[[], None]:
        before = dict(self._data)  # a shallow copy will do: no tensor is written in place

        def put_back() -> None:
            self._data.clear()
            self._data.update(before)

        return put_back

    def lengths(self) -> dict[str, int]:
        return {name: held["rows"].shape[1] for name, held in self._data.items() if name != PADDING_SLOT}


def as_cache(kv_cache: Cache | dict[str, Any] | None) -> Cache | None:
    """``kv_cache`` behind one interface; dicts are wrapped, not copied.

    Raises:
        ValueError: for anything else.
    """
    if kv_cache is None or isinstance(kv_cache, Cache):
        return kv_cache
    if isinstance(kv_cache, dict):
        for name, held in kv_cache.items():
            part, ndim = ("valid", 2) if name == PADDING_SLOT else ("rows", 4)
            is_slot = isinstance(held, dict) and all(isinstance(x, Tensor) for x in held.values())
            is_slot = is_slot and part in held and held[part].ndim == ndim
            must(is_slot, f"kv_cache[{name!r}] was not written by this model; pass an empty dict, or a KVCache")
        return DictCache(kv_cache)
    raise ValueError(f"kv_cache is a {type(kv_cache).__name__}; pass a KVCache, a dict, or None")


def whole(cache: Cache, n_new: int, append: Callable[[], Result]) -> Result:
    """Call ``append``, which appends ``n_new`` tokens to ``cache``; if it raises, restore the cache.

    Raises:
        ValueError: for a cache that another call is appending to.
    """
    mine, put_back = object(), None
    try:
        try:
            must(
                vars(cache).setdefault("_call", mine) is mine,  # setdefault is atomic across threads
                "kv_cache is in use by another call, which is running in another thread or was interrupted; use a "
                "separate cache for each text, or reset() this one",
            )
            put_back = cache.snapshot(n_new)
            return append()
        finally:
            if vars(cache).get("_call") is mine:
                del vars(cache)["_call"]
    except BaseException:
        if put_back is not None:
            put_back()
        raise
