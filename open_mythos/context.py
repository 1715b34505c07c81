"""The context of the tokens of a call: their positions, their attention mask, and the cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from open_mythos.cache import Cache, KVCache, Slot
from open_mythos.dict_cache import as_cache
from open_mythos.ops import draws
from open_mythos.ops.attention import AttentionMask, as_mask
from open_mythos.ops.dispatch import is_traced
from open_mythos.ops.rope import rope_rows, rope_table


@dataclass
class Context:
    """What every layer needs to know of the tokens of a call.

    Attributes:
        rotary: phasors (cos, sin) of the T positions, (T, P/2) or (B, T, P/2) complex, or real with a last axis of 2.
        mask: which keys each query may attend to.
        cache: key/value rows of earlier tokens, to which these tokens' are appended.
        active: the positions that still run, where others have halted (:class:`~open_mythos.nn.active.ActiveTokens`).
        constants: values that are the same in every loop, which layers keep for the run; None to keep nothing.
        keys: (B,) int64, each row's key for random draws; None for torch's own random numbers.
    """

    rotary: Tensor
    mask: AttentionMask
    cache: Cache | None = None
    active: Any = None
    constants: dict[Any, Any] | None = None
    keys: Tensor | None = None

    @staticmethod
    def of(
        positions: Tensor, rope: tuple[int, float, float, int], mask: AttentionMask, cache: Cache | None,
        is_compiled: bool = False,
    ) -> Context:  # fmt: skip
        """The context of tokens at ``positions`` (T,) or (B, T); compiled layers get pairs, not complex numbers."""
        table = rope_table(positions, *rope)
        return Context(table if is_compiled or is_traced() else torch.view_as_complex(table), mask, cache)

    def looping(self) -> Context:
        """This context with an empty ``constants``, for one run of the loops."""
        return replace(self, constants={})

    def rows(self, which: slice | Tensor) -> Context:
        """The context of some rows of the batch."""
        keys = None if self.keys is None else self.keys[which]
        per_row = self.rotary.ndim == (3 if self.rotary.is_complex() else 4) and len(self.rotary) > 1
        rotary = self.rotary[which] if per_row else self.rotary
        return replace(self, rotary=rotary, mask=self.mask.rows(which), keys=keys)

    def noise(self, like: Tensor, slot: Slot) -> Tensor:
        """Normal noise for the rows of ``like`` (B, T, dim)."""
        return torch.randn_like(like) if self.keys is None else draws.normal(self.keys, site(slot) + 2, like)


def site(slot: Slot) -> int:
    """The number, see :mod:`open_mythos.ops.draws`, of a layer's draws at a loop; the next two are its own as well."""
    part, loop = ("prelude", "core", "coda").index(slot.part), 0 if slot.loop is None else slot.loop + 1
    return 3 * (part + 3 * (slot.layer + loop * 1024))  # 1024: more layers than a part has


def as_context(
    freqs: Context | Tensor, mask: AttentionMask | Tensor | None, kv_cache: KVCache | dict[str, Any] | None,
    slot: Slot | str, n_tokens: int,
) -> Context:  # fmt: skip
    """A context for a layer that is called by itself, as in the reference, with phasors, a mask and a cache.

    A table ``freqs`` of more positions than tokens is read from the first position that is not cached.
    """
    if isinstance(freqs, Context):
        return freqs
    cache = as_cache(kv_cache)
    past = cache.slot_length(slot) if cache is not None else 0
    return Context(rope_rows(freqs, past, n_tokens), as_mask(mask, n_tokens, past + n_tokens), cache)
