"""Measured size of key/value caches; what a size should be is in :mod:`open_mythos.diagnostics.cost`."""

from __future__ import annotations

from typing import Any

from open_mythos.cache import KVCache
from open_mythos.dict_cache import PADDING_SLOT


def cache_bytes(kv_cache: KVCache | dict[str, Any]) -> int:
    """Bytes of the key and value rows that a cache holds.

    Neither the padding mask, nor the room that :class:`KVCache` keeps for rows to come, nor the few rows that wait for
    the convolution are counted.
    """
    if isinstance(kv_cache, KVCache):
        return kv_cache.nbytes
    return sum(held["rows"].nbytes for slot, held in kv_cache.items() if slot != PADDING_SLOT)
