"""Our caches' interface over a cache of transformers.

A slot, of one layer and loop, is one layer of the ``Cache``: the halves of its rows are keys and values, (batch,
groups, tokens, width / 2). With a convolution, another one holds the last raw rows. Slots take layers in the order in
which they are first written; layers are added as loops need them, so that any number of loops fits any cache.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from open_mythos.cache import ROLLBACK, Slot, slot_name
from open_mythos.cache import Cache as BaseCache
from open_mythos.fields import must

_SLOTS = "_open_mythos_slots"  # on the Cache: the layer of each slot, by name
_SPARE = "_open_mythos_spare"  # on the Cache: an unused layer, to be copied
_RAW = "/raw"  # ends the name of the layer with a slot's raw rows


class RawLayer(DynamicLayer):
    """The last raw rows of a slot, with ``seen`` tokens in all; reordered and repeated with the others."""

    keys: Any
    values: Any
    is_initialized: bool

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seen = 0

    def append(self, raw: Tensor, at: int, kept: int) -> None:
        """Add raw rows (B, G, T, W) at position ``at``, and keep so many of the last."""
        if not self.is_initialized:
            self.lazy_initialization(raw, raw)
        held = raw if at == 0 else torch.cat([self.before(at, self.keys.shape[2]), raw], 2)
        self.keys, self.values, self.seen = held[:, :, -kept:], raw[..., :0], at + raw.shape[2]

    def before(self, at: int, n: int) -> Tensor:
        """The ``n`` rows before position ``at``, or as many as there are."""
        return self.keys[:, :, : self.keys.shape[2] - (self.seen - at)][:, :, -n:]

    def get_seq_length(self) -> int:
        return self.seen

    def crop(self, *args: Any) -> None:
        """Nothing: the rows of the slot tell how many tokens are left."""

    def reset(self) -> None:
        self.keys, self.values, self.is_initialized, self.seen = None, None, False, 0


class SlotCache(BaseCache):
    """A ``Cache`` of transformers seen through the interface of :class:`~open_mythos.KVCache`, for one call.

    Args:
        cache: it; crop it, reorder its rows, copy it at will between calls.

    Raises:
        ValueError: for something else, and for a cache that another model has filled.
    """

    def __init__(self, cache: Cache) -> None:
        if not isinstance(cache, Cache):
            raise ValueError(f"the cache is a {type(cache).__name__}; pass a transformers Cache, or None")
        if not hasattr(cache, _SLOTS):
            if cache.get_seq_length() > 0:
                raise ValueError("the cache was filled by another model; pass a new cache, or None")
            setattr(cache, _SLOTS, {})
            setattr(cache, _SPARE, copy.deepcopy(cache.layers[-1]) if cache.layers else None)
            cache.layers.clear()
        self.cache = cache
        self._slots: dict[str, _Slot] = {}
        self.valid = None  # of this call: transformers gives the whole mask at every one

    @property
    def batch_size(self) -> int:
        return next((len(layer.keys) for layer in self.cache.layers if layer.keys is not None), 0)

    def slot(self, slot: Slot | str) -> _Slot:
        name = slot_name(slot)
        return self._slots.setdefault(name, _Slot(self, name))

    def lengths(self) -> dict[str, int]:
        layers = getattr(self.cache, _SLOTS).items()
        return {name: int(self.cache.get_seq_length(layer)) for name, layer in layers if not name.endswith(_RAW)}

    def layer_of(self, name: str) -> int:
        """The layer of a slot, made if it is new."""
        layers: dict[str, int] = getattr(self.cache, _SLOTS)
        layer, spare = layers.setdefault(name, len(layers)), getattr(self.cache, _SPARE)
        is_raw = name.endswith(_RAW)
        while len(self.cache.layers) <= layer and (is_raw or spare is not None):  # else the cache adds its own
            self.cache.layers.append(RawLayer() if is_raw else copy.deepcopy(spare))
        return layer

    def raw_layer(self, name: str) -> RawLayer:
        """The raw rows of a slot whose rows have a layer."""
        layer = self.cache.layers[self.layer_of(name + _RAW)]
        assert isinstance(layer, RawLayer)
        return layer


class _Slot:
    """A slot in this call. Like those of a plain dict, it only ever gets new rows behind its last."""

    def __init__(self, cache: SlotCache, name: str) -> None:
        self._cache, self._name = cache, name
        self.rows: Tensor  # all of it, once this call has written some

    @property
    def length(self) -> int:
        layer = getattr(self._cache.cache, _SLOTS).get(self._name)
        return 0 if layer is None else int(self._cache.cache.get_seq_length(layer))

    def raw_before(self, at: int, n: int) -> Tensor | None:
        if at == 0 or n == 0:
            return None
        raw = self._cache.raw_layer(self._name)
        held = raw.before(at, n).transpose(1, 2)
        must(
            held.shape[1] == min(n, at) and raw.seen - at <= ROLLBACK,
            f"the cache was cut back to {at} of {raw.seen} tokens, and this model's convolution keeps what it needs "
            f"for {ROLLBACK}; start a new cache",
        )
        return held if at >= n else torch.cat([held.new_zeros(len(held), n - at, *held.shape[2:]), held], 1)

    def update(self, rows: Tensor, raw: Tensor | None = None, at: int | None = None, n_raw: int = 0) -> Tensor:
        start, half = self.length, rows.shape[-1] // 2
        keys, values = (part.transpose(1, 2) for part in rows.split([half, rows.shape[-1] - half], -1))
        layer = self._cache.layer_of(self._name)
        held = self._cache.cache.update(keys, values, layer)
        length = self.length  # a static layer hands out all its room
        self.rows = torch.cat([part[:, :, :length] for part in held], -1).transpose(1, 2)
        if raw is not None:
            self._cache.raw_layer(self._name).append(raw.transpose(1, 2), start, ROLLBACK + n_raw)
        return self.rows

    def repeat(self, before: _Slot) -> None:
        start, end = self.length, before.length
        self.update(before.rows[:, start:])
        if before._name + _RAW in getattr(self._cache.cache, _SLOTS):
            raw, theirs = self._cache.raw_layer(self._name), self._cache.raw_layer(before._name)
            new = theirs.keys[:, :, -min(end - start, theirs.keys.shape[2]) :]
            if end - start > new.shape[2]:
                raw.seen, raw.keys = end - new.shape[2], new[:, :, :0]
            raw.append(new, end - new.shape[2], theirs.keys.shape[2])
