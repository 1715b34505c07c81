"""This library's cache interface over a transformers cache.

A slot (one layer and loop) is one layer of the ``Cache``: the halves of its rows are stored as keys and values, (batch,
groups, tokens, width / 2). With a convolution, another layer holds the last raw rows. Slots get layers in the order in
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
_SPARE = "_open_mythos_spare"  # on the Cache: an unused layer, copied to make new ones
_RAW = "/raw"  # suffix of the name of the layer with a slot's raw rows


class RawLayer(DynamicLayer):
    """The last raw rows of a slot, after ``seen`` tokens in all; reordered and repeated like other layers."""

    keys: Any
    values: Any
    is_initialized: bool

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seen = 0

    def append(self, raw: Tensor, at: int, kept: int) -> None:
        """Add raw rows (B, G, T, W) at position ``at``, and keep the last ``kept`` rows."""
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
        """Nothing to do: the length of the slot's rows says how many tokens are left."""

    def reset(self) -> None:
        self.keys, self.values, self.is_initialized, self.seen = None, None, False, 0


class SlotCache(BaseCache):
    """A ``Cache`` of transformers seen through the interface of :class:`~open_mythos.KVCache`, for one call.

    Args:
        cache: may be cropped, reordered and copied between calls.

    Raises:
        ValueError: for anything but a ``Cache``, and for one that another model has filled.
    """

    def __init__(self, cache: Cache) -> None:
        if not isinstance(cache, Cache):
            raise ValueError(f"the cache is a {type(cache).__name__}; pass a transformers Cache, or None")
        if not hasattr(cache, _SLOTS):
            if cache.get_seq_length() > 0:
                raise ValueError("the cache was filled by another model or by prefix tuning; pass a new cache, or None")
            setattr(cache, _SLOTS, {})
            setattr(cache, _SPARE, copy.deepcopy(cache.layers[-1]) if cache.layers else None)
            cache.layers.clear()
        self.cache = cache
        self._slots: dict[str, _Slot] = {}
        self.valid = None  # set at every call, as transformers always passes the whole mask

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
        """The index of a slot's layer, which is added if it is new."""
        layers: dict[str, int] = getattr(self.cache, _SLOTS)
        layer, spare = layers.setdefault(name, len(layers)), getattr(self.cache, _SPARE)
        is_raw = name.endswith(_RAW)
        while len(self.cache.layers) <= layer and (is_raw or spare is not None):  # else the Cache adds its own layers
            self.cache.layers.append(RawLayer() if is_raw else copy.deepcopy(spare))
        return layer

    def raw_layer(self, name: str) -> RawLayer:
        """The layer of raw rows of a slot that has been written."""
        layer = self.cache.layers[self.layer_of(name + _RAW)]
        assert isinstance(layer, RawLayer)
        return layer


class _Slot:
    """A slot during one call. As with plain dicts, new rows are always appended."""

    def __init__(self, cache: SlotCache, name: str) -> None:
        self._cache, self._name = cache, name
        self.rows: Tensor  # all rows, set once this call has written some

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
            f"the cache was truncated from {raw.seen} to {at} tokens, but the inputs of this model's convolution are "
            f"kept for at most {ROLLBACK} tokens; start a new cache",
        )
        return held if at >= n else torch.cat([held.new_zeros(len(held), n - at, *held.shape[2:]), held], 1)

    def update(self, rows: Tensor, raw: Tensor | None = None, at: int | None = None, n_raw: int = 0) -> Tensor:
        start, half = self.length, rows.shape[-1] // 2
        keys, values = (part.transpose(1, 2) for part in rows.split([half, rows.shape[-1] - half], -1))
        layer = self._cache.layer_of(self._name)
        held = self._cache.cache.update(keys, values, layer)
        length = self.length  # a static layer returns its whole buffer
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
