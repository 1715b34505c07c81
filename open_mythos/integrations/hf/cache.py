"""Our caches' interface over a cache of transformers, which then does what transformers does with caches.

Every layer and every loop writes a slot. A slot is one layer of the ``Cache``: keys and values for GQA, latents and
rotary keys for MLA, (batch, heads, tokens, channels) as transformers keeps them. Slots take layers in the order in
which they are first written, and layers are added as loops need them, so that any number of loops fits any cache.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers import Cache

from open_mythos.cache import DictCache

_SLOTS = "_open_mythos_slots"  # on the Cache: the layer of each slot, by name
_SPARE = "_open_mythos_spare"  # on the Cache: an unused layer, to be copied


class SlotCache(DictCache):
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
        self._valid: Tensor | None = None

    @property
    def length(self) -> int:
        return max(self.lengths().values(), default=0)

    @property
    def batch_size(self) -> int:
        return next((len(layer.keys) for layer in self.cache.layers if layer.keys is not None), 0)

    @property
    def valid(self) -> Tensor | None:
        """(B, length) bool, False at padding, for this call: transformers gives the whole mask at every call."""
        return self._valid

    @valid.setter
    def valid(self, valid: Tensor | None) -> None:
        self._valid = valid

    def slot(self, name: str) -> _Slot:  # type: ignore[override]
        if name not in self._slots:
            self._slots[name] = _Slot(self, name)
        return self._slots[name]

    def lengths(self) -> dict[str, int]:
        return {name: int(self.cache.get_seq_length(layer)) for name, layer in getattr(self.cache, _SLOTS).items()}

    def layer_of(self, name: str) -> int:
        """The layer of a slot, made if it is new."""
        layers: dict[str, int] = getattr(self.cache, _SLOTS)
        layer, spare = layers.setdefault(name, len(layers)), getattr(self.cache, _SPARE)
        while spare is not None and len(self.cache.layers) <= layer:  # without a spare, the cache adds its own
            self.cache.layers.append(copy.deepcopy(spare))
        return layer


class _Slot:
    """A slot in this call. Like those of a plain dict, it only ever gets new rows behind its last."""

    def __init__(self, cache: SlotCache, name: str) -> None:
        self._cache, self._name = cache, name
        self.rows: dict[str, Tensor] = {}  # all of it, once this call has written some

    @property
    def length(self) -> int:
        layer = getattr(self._cache.cache, _SLOTS).get(self._name)
        return 0 if layer is None else int(self._cache.cache.get_seq_length(layer))

    def update(self, new: dict[str, Tensor], at: int | None = None) -> dict[str, Tensor]:
        keys, values = new.values()
        layer = self._cache.layer_of(self._name)
        held = self._cache.cache.update(_heads_first(keys), _heads_first(values), layer)
        length = self.length  # a static layer hands out all its room
        self.rows = {
            name: _tokens_first(x[:, :, :length], like) for name, x, like in zip(new, held, new.values(), strict=True)
        }
        return self.rows

    def repeat(self, before: Any) -> None:
        start = self.length
        self.update({name: rows[:, start:] for name, rows in before.rows.items()})


def _heads_first(rows: Tensor) -> Tensor:
    """(B, T, G, D) or (B, T, D) as (B, G or 1, T, D)."""
    return rows.transpose(1, 2) if rows.ndim == 4 else rows.unsqueeze(1)


def _tokens_first(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`_heads_first`, for rows that were ``like`` it."""
    return rows.transpose(1, 2) if like.ndim == 4 else rows.squeeze(1)
