"""What both kinds of attention share: cache, halted positions, and the split into global and local heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from open_mythos.cache import Cache, as_cache
from open_mythos.nn.active import ActiveTokens
from open_mythos.ops.attention import CausalMask, attend, attend_local
from open_mythos.ops.rope import rope_rows

Rows = dict[str, Tensor]


class CausalAttention(nn.Module):
    """Base of :class:`GQAttention` and :class:`MLAttention`: the order of work around a score function.

    A subclass says how tokens become queries and cacheable rows (:meth:`project`), and how queries read all rows
    (:meth:`read`).

    Args:
        n_heads: query heads.
        local_window: if above 0, the first half of the heads sees only this many last tokens.
    """

    def __init__(self, n_heads: int, local_window: int = 0) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.local_window = local_window
        self.n_local_heads = n_heads // 2 if local_window else 0

    def forward(
        self,
        x: Tensor,
        freqs: Tensor,
        mask: CausalMask | None = None,
        kv_cache: Cache | dict[str, Rows] | None = None,
        cache_key: str = "default",
        active: ActiveTokens | None = None,
    ) -> Tensor:
        """Attend causally.

        Args:
            x: tokens, (B, T, dim); or the running ones alone, (1, N, dim), with ``active``.
            freqs: rotary phasors or (cos, sin) pairs of these tokens, see :func:`open_mythos.ops.rope.apply_rope`.
                A table of more positions than tokens is read from the first position that the cache lacks.
            mask: who sees whom; plain causal if None.
            kv_cache: rows of earlier tokens; this call's are appended.
            cache_key: slot of the cache.
            active: which positions of the batch ``x`` holds, when some have halted.

        Returns:
            As x.
        """
        if mask is not None and not isinstance(mask, CausalMask):
            raise ValueError(
                f"mask is a {type(mask).__name__}; attention is causal by itself, so pass None, or give padding "
                f"to the model as attention_mask"
            )
        cache = as_cache(kv_cache)
        freqs = rope_rows(freqs, cache.lengths().get(cache_key, 0) if cache is not None else 0, x.shape[1])
        q, rows = self.project(x, freqs)
        if active is not None:
            q, rows = active.pack(q), active.merge(rows)
        if cache is not None:
            rows = cache.slot(cache_key).update(rows)
        mask = mask or CausalMask(q.shape[1], next(iter(rows.values())).shape[1])
        out = self.read(q, rows, mask)
        return self.wo((active.unpack(out) if active is not None else out).flatten(2))

    def project(self, x: Tensor, freqs: Tensor) -> tuple[Tensor, Rows]:
        """Queries (B, T, H, D) and the rows to cache, (B, T, ...) each."""
        raise NotImplementedError

    def read(self, q: Tensor, rows: Rows, mask: CausalMask) -> Tensor:
        """What the queries find in all rows: (B, T, H, Dv)."""
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: CausalMask, scale: float | None = None) -> Tensor:
        """Local attention for the first ``n_local_heads`` heads, global for the rest; shapes as ops.attention."""
        n = self.n_local_heads
        if n == 0:
            return attend(q, k, v, mask, scale)
        local = attend_local(q[:, :, :n], *self._heads(slice(0, n), k, v), self.local_window, mask, scale)
        rest = attend(q[:, :, n:], *self._heads(slice(n, self.n_heads), k, v), mask, scale)
        return torch.cat([local, rest], dim=2)

    def _heads(self, span: slice, *tensors: Tensor) -> list[Tensor]:
        """The key/value heads (B, S, G, D) that the query heads in ``span`` read."""
        n_query = span.stop - span.start
        found = []
        for x in tensors:
            per_group = self.n_heads // x.shape[2]
            if span.start % per_group == 0 and n_query % per_group == 0:
                found.append(x[:, :, span.start // per_group : span.stop // per_group])
            elif x.shape[2] == 1:
                found.append(x)
            else:
                found.append(x[:, :, [head // per_group for head in range(span.start, span.stop)]])
        return found
