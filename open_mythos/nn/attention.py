"""What both kinds of attention share: cache, halted positions, and the split into global and local heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from open_mythos.cache import Cache, as_cache
from open_mythos.config import MythosConfig
from open_mythos.nn.active import ActiveTokens
from open_mythos.nn.linear import Linear, apply
from open_mythos.ops.attention import attend, attend_convolved, attend_local, attend_local_convolved
from open_mythos.ops.attention_kernel import attend_few, attend_heads, is_native, is_native_for_few
from open_mythos.ops.mask import CausalMask
from open_mythos.ops.rope import rope_rows

Rows = dict[str, Tensor]
Taps = tuple[Tensor, Tensor]
"""Of keys (1, K, G, D) and of values (1, K, G, Dv)."""

_FEW = 16  # rows for one query, from which on they are not convolved before they are read


def without_padding(rows: Rows, valid: Tensor) -> Rows:
    """``rows`` (B, T, ...), zero at padding, where no gradient may pass either.

    The norm of a zero row multiplies gradients by a thousand, which overflows over a few loops, and infinity times
    zero is not a number.

    Args:
        rows: of the last T tokens.
        valid: (B, S) bool, S at least T.
    """
    padding = ~valid[:, -next(iter(rows.values())).shape[1] :]
    return {name: x.masked_fill(padding.view(*x.shape[:2], *[1] * (x.ndim - 2)), 0) for name, x in rows.items()}


class CausalAttention(nn.Module):
    """Base of :class:`GQAttention` and :class:`MLAttention`: the order of work around a score function.

    A subclass says how tokens become queries and cacheable rows (:meth:`project`), and how queries read all rows
    (:meth:`read`).

    Args:
        cfg: reads n_heads, n_local_heads.
        local_window: if above 0, ``cfg.n_local_heads`` of the heads see only this many last tokens.
    """

    wo: Linear

    def __init__(self, cfg: MythosConfig, local_window: int = 0) -> None:
        super().__init__()
        self.n_heads = cfg.n_heads
        self.local_window = local_window
        self.n_local_heads = cfg.n_local_heads if local_window else 0

    def forward(
        self,
        x: Tensor,
        freqs: Tensor,
        mask: CausalMask | None = None,
        kv_cache: Cache | dict[str, Rows] | None = None,
        cache_key: str = "default",
        active: ActiveTokens | None = None,
        last: int | None = None,
    ) -> Tensor:
        """Attend causally.

        Args:
            x: tokens, (B, T, dim); or the running ones alone, (1, N, dim), with ``active``.
            freqs: rotary phasors or (cos, sin) pairs of these tokens, see :func:`open_mythos.ops.rope.apply_rope`.
                A table of more positions than tokens is read from the first position that the cache lacks.
            mask: who sees whom; plain causal if None.
            kv_cache: rows of earlier tokens; this call's are written where ``mask`` says that the new tokens stand, or
                appended.
            cache_key: slot of the cache.
            active: which positions of the batch ``x`` holds, when some have halted.
            last: how many of the last tokens ask; all if None. The rows of all of them are cached and seen.

        Returns:
            As x, of the tokens that ask.
        """
        if mask is not None and not isinstance(mask, CausalMask):
            raise ValueError(
                f"mask is a {type(mask).__name__}; attention is causal by itself, so pass None, or give padding "
                f"to the model as attention_mask"
            )
        cache = as_cache(kv_cache)
        freqs = rope_rows(freqs, cache.slot_length(cache_key) if cache is not None else 0, x.shape[1])
        q, rows = self.project(x, freqs)
        if active is not None:
            q, rows = active.pack(q), active.merge(rows)
        if mask is not None and mask.valid is not None:
            rows = without_padding(rows, mask.valid)
        if cache is not None:
            rows = cache.slot(cache_key).update(rows, None if mask is None else mask.n_keys - mask.n_new)
        mask = mask or CausalMask(q.shape[1], next(iter(rows.values())).shape[1])
        if last is not None:
            q = q[:, -last:]
            mask = mask.ending(q.shape[1])
        out = self.read(q, rows, mask)
        if mask.valid is not None and (active is None or active.is_everything):  # padding halts after the first loop
            out = without_padding({"out": out}, mask.valid)["out"]  # behind a convolution it sees real tokens
        return apply(self.wo, (active.unpack(out) if active is not None else out).flatten(2))

    def project(self, x: Tensor, freqs: Tensor) -> tuple[Tensor, Rows]:
        """Queries (B, T, H, D) and the rows to cache, (B, T, ...) each."""
        raise NotImplementedError

    def read(self, q: Tensor, rows: Rows, mask: CausalMask) -> Tensor:
        """What the queries find in all rows: (B, T, H, Dv)."""
        raise NotImplementedError

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: CausalMask,
        scale: float | None = None,
        taps: Taps | None = None,
    ) -> Tensor:
        """Local attention for the first ``n_local_heads`` heads, global for the rest; shapes as ops.attention.

        ``taps`` are of a short convolution that keys and values have still to pass; nothing of their length is then
        written (see :func:`attend_convolved`).
        """
        n, found = self.n_local_heads, []
        scale = q.shape[3] ** -0.5 if scale is None else scale
        if taps is None and is_native(q, k, mask):
            return attend_heads(q, k, v, mask, scale, n, self.local_window)
        if taps is not None and is_native_for_few(q, mask):
            return attend_few(q, k, v, taps[0][0], taps[1][0], mask, scale, n, self.local_window)
        if n:
            found.append(self._attend_near(range(n), q, k, v, mask, scale, taps))
        if n < self.n_heads:
            found.append(self._attend_far(range(n, self.n_heads), q, k, v, mask, scale, taps))
        return found[0] if len(found) == 1 else torch.cat(found, dim=2)

    def _attend_near(
        self, heads: range, q: Tensor, k: Tensor, v: Tensor, mask: CausalMask, scale: float, taps: Taps | None
    ) -> Tensor:
        """Local attention of some heads."""
        q, k, v = q[:, :, heads.start : heads.stop], self._read_by(heads, k), self._read_by(heads, v)
        if taps is None:
            return attend_local(q, k, v, self.local_window, mask, scale)
        k_taps, v_taps = (self._read_by(heads, tap)[0] for tap in taps)
        return attend_local_convolved(q, k, v, k_taps, v_taps, self.local_window, mask, scale)

    def _attend_far(
        self, heads: range, q: Tensor, k: Tensor, v: Tensor, mask: CausalMask, scale: float, taps: Taps | None
    ) -> Tensor:
        """Global attention of some heads."""
        q, k, v = q[:, :, heads.start : heads.stop], self._read_by(heads, k), self._read_by(heads, v)
        if taps is None:
            return attend(q, k, v, mask, scale)
        k_taps, v_taps = (self._read_by(heads, tap)[0] for tap in taps)
        return attend_convolved(q, k, v, k_taps, v_taps, mask, scale)

    @staticmethod
    def are_few(q: Tensor, rows: Rows, mask: CausalMask) -> bool:
        """Whether there are so few queries that convolving all rows for them would cost more than reading them.

        Never between documents, which a convolution that moves to the queries does not know.
        """
        return mask.starts is None and q.shape[1] * _FEW <= next(iter(rows.values())).shape[1]

    def _read_by(self, heads: range, x: Tensor) -> Tensor:
        """The key/value heads of ``x`` (B, S, G, D) that the query ``heads`` read."""
        per_group = self.n_heads // x.shape[2]
        if heads.start % per_group == 0 and len(heads) % per_group == 0:
            return x[:, :, heads.start // per_group : heads.stop // per_group]
        return x if x.shape[2] == 1 else x[:, :, [head // per_group for head in heads]]
