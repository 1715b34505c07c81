"""Causal attention for queries that are the last tokens, or any subset of the last tokens, of the keys.

Shape letters: B rows, T queries, S keys, H query heads, G key/value heads, D channels of a head, W window.
The slow, obvious twin is :func:`open_mythos.ops.reference.attention`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 32  # queries that local attention takes together


@dataclass
class CausalMask:
    """Who may look at whom: a query sees every key of its document up to its own position, except padding.

    Args:
        n_queries: T.
        n_keys: S; query i stands at key position ``S - T + i`` unless ``positions`` says otherwise.
        valid: (B, S) bool, False at padding; None if there is none. A padding query sees itself, so that no
            softmax is over nothing.
        positions: (B, T) key position of each query, for queries that are not the last T tokens in order.
        first: position of the first new token, from which on queries stand; ``S - T`` if None.
        starts: (B, S) int64 position at which the document of each key starts, see :func:`document_starts`; None if a
            row is one document.
    """

    n_queries: int
    n_keys: int
    valid: Tensor | None = None
    positions: Tensor | None = None
    first: int | None = None
    starts: Tensor | None = None
    _dense: Tensor | None = field(default=None, init=False, repr=False)
    _bands: dict[tuple[int, int, torch.device], Tensor] = field(default_factory=dict, init=False, repr=False)

    def query_positions(self, device: torch.device) -> Tensor:
        """(B or 1, T)."""
        if self.positions is not None:
            return self.positions
        return torch.arange(self.n_keys - self.n_queries, self.n_keys, device=device).unsqueeze(0)

    @property
    def n_new(self) -> int:
        """Keys from the first that may be a query on."""
        return self.n_queries if self.first is None else self.n_keys - self.first

    def last(self, n_keys: int) -> CausalMask:
        """The mask of the same queries for the last ``n_keys`` keys alone, ``n_new`` at least."""
        cut = self.n_keys - n_keys
        return CausalMask(
            self.n_queries, n_keys,
            None if self.valid is None else self.valid[:, cut:],
            None if self.positions is None else (self.positions - cut).clamp(min=0),  # of unused slots, anything
            None if self.first is None else self.first - cut,
            None if self.starts is None else self.starts[:, cut:] - cut,
        )  # fmt: skip

    def ending(self, n_queries: int) -> CausalMask:
        """The mask of the last queries alone, which see the same keys; for queries that are the last T tokens."""
        assert self.positions is None and n_queries <= self.n_queries
        return CausalMask(n_queries, self.n_keys, self.valid, starts=self.starts)

    def rows(self, which: slice | Tensor) -> CausalMask:
        """The mask of some rows of the batch, for queries that are the last T tokens."""
        assert self.positions is None
        valid, starts = (None if x is None else x[which] for x in (self.valid, self.starts))
        return CausalMask(self.n_queries, self.n_keys, valid, first=self.first, starts=starts)

    @property
    def is_same_for_all(self) -> bool:
        """True where no row of the batch differs from another."""
        return self.valid is None and self.starts is None and self.positions is None

    @property
    def is_plain(self) -> bool:
        """True where SDPA needs no mask: all tokens are queries, or one query sees every key."""
        return self.is_same_for_all and self.n_queries in (1, self.n_keys)

    @property
    def is_last(self) -> bool:
        """True for one query that sees every key."""
        return self.n_queries == 1 and self.is_plain

    def dense(self, device: torch.device) -> Tensor:
        """(B or 1, 1, T, S) bool, True where a query may look; made once for all layers and loops that ask."""
        if torch.compiler.is_compiling():  # code that finds what other code left here is other code
            return self._make_dense(device)
        if self._dense is None or self._dense.device != device:
            self._dense = self._make_dense(device)
        return self._dense

    def _make_dense(self, device: torch.device) -> Tensor:
        at = self.query_positions(device).unsqueeze(-1)
        key = torch.arange(self.n_keys, device=device)
        seen = key <= at
        if self.starts is not None:
            seen = seen & (key >= self.starts_at(self.query_positions(device)).unsqueeze(-1))
        if self.valid is not None:
            seen = seen & self.valid.unsqueeze(1) | (key == at)
        return seen.unsqueeze(1)

    def chunk(self, window: int) -> int:
        """How many queries local attention takes together: keys that not all of them see are what it wastes."""
        chunk = self.n_queries if self.n_queries < _CHUNK else _CHUNK  # not min and max, which compilers do not decide
        return chunk if chunk >= window - 1 else window - 1

    def chunked_band(self, window: int, B: int, device: torch.device) -> Tensor:
        """(B * chunks, 1, chunk, chunk + window - 1) bool: who sees whom in chunks; made once for all loops."""
        key = (window, B, device)
        if torch.compiler.is_compiling():
            return self._make_chunked_band(B, window, device)
        if key not in self._bands:
            self._bands[key] = self._make_chunked_band(B, window, device)
        return self._bands[key]

    def _make_chunked_band(self, B: int, window: int, device: torch.device) -> Tensor:
        chunk = self.chunk(window)
        n_chunks = -(-self.n_queries // chunk)
        at = torch.arange(chunk, device=device).unsqueeze(1)
        key = torch.arange(chunk + window - 1, device=device)
        near = (key >= at) & (key < at + window)  # query i stands at key i + window - 1
        position = torch.arange(n_chunks, device=device).unsqueeze(1) * chunk + key
        position = position + self.n_keys - self.n_queries - window + 1
        real = ((position >= 0) & (position < self.n_keys)).unsqueeze(0)
        if self.valid is not None:
            real = real & self.valid[:, position.clamp(0, self.n_keys - 1)]
        seen = near & real.unsqueeze(2)
        if self.starts is not None:
            queries = position[:, window - 1 :].clamp(0, self.n_keys - 1)
            seen = seen & (position.unsqueeze(1) >= self.starts[:, queries].unsqueeze(-1))
        seen = seen | (key == at + window - 1)  # (B or 1, chunks, chunk, chunk + window - 1)
        return seen.expand(B, -1, -1, -1).flatten(0, 1).unsqueeze(1)

    def starts_at(self, positions: Tensor) -> Tensor:
        """Where the documents of the keys at ``positions`` (B or 1, T) start: (B, T)."""
        assert self.starts is not None
        return self.starts.gather(1, positions.expand(len(self.starts), -1))

    def band(self, key_positions: Tensor) -> Tensor:
        """True where ``key_positions`` (B or 1, T, W) hold a key that the query may look at (itself always)."""
        seen = key_positions >= 0
        if self.starts is not None:
            seen = key_positions >= self.starts_at(key_positions[..., -1]).unsqueeze(-1)
        if self.valid is not None:
            B, T, W = self.valid.shape[0], *key_positions.shape[1:]
            at = key_positions.clamp(min=0).expand(B, T, W).flatten(1)
            seen = seen & self.valid.gather(1, at).view(B, T, W)
            seen[..., -1] = True
        return seen


def attend(q: Tensor, k: Tensor, v: Tensor, mask: CausalMask, scale: float | None = None) -> Tensor:
    """Softmax attention by PyTorch's fused kernel.

    Args:
        q: (B, T, H, D).
        k: (B, S, G, D), G dividing H.
        v: (B, S, G, Dv).
        mask: who sees whom.
        scale: of the scores; ``1 / sqrt(D)`` if None.

    Returns:
        (B, T, H, Dv).
    """
    if mask.is_plain:
        return _sdpa(q, k, v, None, is_causal=not mask.is_last, scale=scale)
    return _sdpa(q, k, v, mask.dense(q.device), scale=scale)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """PyTorch's attention for (B, T, H, D) tensors; ``allowed`` is (B or 1, 1, T, S) bool."""
    if (
        q.device.type == "cpu"
        and q.dtype.itemsize < 4
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    ):
        # The CPU's backward pass takes four times as long in half precision as in single.
        with torch.autocast("cpu", enabled=False):
            return _sdpa(q.float(), k.float(), v.float(), allowed, is_causal, scale).to(q.dtype)
    D, Dv = q.shape[-1], v.shape[-1]
    # The kernels that keep no T x S scores want one width. Their backward pass makes the weights again from scores and
    # their rounded normaliser, which explodes where scores are huge, as in a model that an optimizer has run away with.
    if Dv != D and q.shape[1] > 1 and not torch.is_grad_enabled():
        scale = D**-0.5 if scale is None else scale
        q, k, v = (F.pad(x, (0, max(D, Dv) - x.shape[-1])) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=allowed,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)[..., :Dv]


def attend_convolved(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_taps: Tensor,
    v_taps: Tensor,
    mask: CausalMask,
    scale: float | None = None,
    beside: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """:func:`attend` to keys and values behind a :func:`causal_conv`, which is not computed: for few queries.

    A convolution is linear, so it moves to the queries and to what they find: ``q . sum_j tap_j k[s - j]`` is
    ``sum_j (q tap_j) . k[s - j]``, one product with the keys as they are and a shift of its scores; likewise
    ``sum_s w[s] sum_j tap_j v[s - j]`` is ``sum_j tap_j sum_u w[u + j] v[u]``. Keys and values are read once, and
    nothing of their size is written.

    Args:
        q, k, v, mask, scale: as :func:`attend`.
        k_taps: (K, G, D).
        v_taps: (K, G, Dv).
        beside: channels of queries (B, T, H, P) and keys (B, S, G, P) whose products are added to the scores, and
            which no convolution touches. With them, ``scale`` has no default.

    Returns:
        (B, T, H, Dv).
    """
    B, _, H, D = q.shape
    G = k.shape[2]
    scale = D**-0.5 if scale is None else scale
    allowed = None if mask.is_last else mask.dense(q.device)[:, 0]
    queries = [q] if beside is None else [q, beside[0]]
    keys = [k, v] if beside is None else [k, v, beside[1]]
    queries, keys = [x.unflatten(2, (G, -1)) for x in queries], [x.transpose(1, 2) for x in keys]
    taps = [x.transpose(0, 1) for x in (k_taps, v_taps)]
    if B == 1:
        found = _attend_batch([x[0].transpose(0, 1) for x in queries], [x[0] for x in keys], taps, scale, allowed)
        return found.transpose(0, 1).reshape(1, -1, H, v.shape[3])
    # Rows and groups are not one axis in memory, so one of the two is gone through.
    parts = []
    for g in range(G):
        group = [x[:, :, g] for x in queries], [x[:, g] for x in keys], [x[g : g + 1] for x in taps]
        parts.append(_attend_batch(*group, scale, allowed))
    return torch.cat(parts, 2)


def _attend_batch(
    queries: list[Tensor], keys: list[Tensor], taps: list[Tensor], scale: float, allowed: Tensor | None
) -> Tensor:
    """:func:`attend_convolved` of N rows or groups: (N, T, R, Dv).

    Args:
        queries: (N, T, R, D), and (N, T, R, P) if there are channels beside.
        keys: keys (N, S, D) and values (N, S, Dv), and (N, S, P).
        taps: of keys (N or 1, K, D) and of values (N or 1, K, Dv).
        scale: of the scores.
        allowed: (N or 1, T, S) bool, True where a query may look; None if it is everywhere.
    """
    (q_NTRD, *q_beside), (k_NSD, v_NSV, *k_beside), (k_taps, v_taps) = queries, keys, taps
    (N, T, R, D), S, K = q_NTRD.shape, k_NSD.shape[1], k_taps.shape[1]
    q_NKTRD = q_NTRD.unsqueeze(1) * k_taps[:, :, None, None]
    zero = q_NTRD.new_empty(())
    products = torch.baddbmm(zero, q_NKTRD.reshape(N, -1, D), k_NSD.transpose(1, 2), beta=0, alpha=scale)
    products = products.view(N, K, T * R, S)
    scores = products[:, 0].float()
    for j in range(1, min(K, S)):
        scores[..., j:].add_(products[:, j, :, : S - j])
    if q_beside:
        scores.baddbmm_(q_beside[0].flatten(1, 2).float(), k_beside[0].transpose(1, 2).float(), alpha=scale)
    if allowed is not None:
        scores.view(N, T, R, S).masked_fill_(~allowed.unsqueeze(2), float("-inf"))
    weights = F.pad(scores.softmax(-1), (0, K - 1)).to(v_NSV.dtype)
    width = S + K - 1
    shifted = weights.as_strided((N, K, T * R, S), (T * R * width, 1, width, 1)).reshape(N, -1, S)
    found = torch.bmm(shifted, v_NSV).view(N, K, T, R, -1)
    return (found * v_taps[:, :, None, None]).sum(1)


def attend_local(q: Tensor, k: Tensor, v: Tensor, window: int, mask: CausalMask, scale: float | None = None) -> Tensor:
    """Attention to the last ``window`` positions only, the query's own included; cost T * W, not T * S.

    Shapes as in :func:`attend`.
    """
    T, H, D, G = *q.shape[1:], k.shape[2]
    if mask.positions is None and T > 1:
        return _attend_chunks(q, k, v, window, mask, scale)
    if mask.is_plain:
        return _attend_sums(q, k[:, -window:], v[:, -window:], D**-0.5 if scale is None else scale)
    offsets = torch.arange(window - 1, -1, -1, device=q.device)
    at = mask.query_positions(q.device).unsqueeze(-1) - offsets  # (B|1, T, W)
    if mask.positions is None:
        k_W, v_W = _shifted(k, T, window), _shifted(v, T, window)
    else:
        k_W, v_W = list(_rows_at(k, at).unbind(2)), list(_rows_at(v, at).unbind(2))
    # W products over whole tensors beat one batched product of very small matrices.
    q_BTGRD = q.unflatten(2, (G, H // G)) * (D**-0.5 if scale is None else scale)
    scores = torch.stack([(q_BTGRD * k_BTGD.unsqueeze(3)).sum(-1, dtype=torch.float32) for k_BTGD in k_W], -1)
    weights = scores.masked_fill(~mask.band(at)[:, :, None, None], float("-inf")).softmax(-1).to(v.dtype)
    found = [weights[..., w, None] * v_BTGD.unsqueeze(3) for w, v_BTGD in enumerate(v_W)]
    return sum(found[1:], found[0]).flatten(2, 3)


def _attend_chunks(q: Tensor, k: Tensor, v: Tensor, window: int, mask: CausalMask, scale: float | None) -> Tensor:
    """:meth:`attend_local` for the last T positions, in chunks of queries and the keys that any of them sees."""
    B, T = q.shape[:2]
    chunk = mask.chunk(window)
    n_chunks = -(-T // chunk)
    q = F.pad(q, (0, 0, 0, 0, 0, n_chunks * chunk - T)).unflatten(1, (n_chunks, chunk)).flatten(0, 1)
    k, v = (_windows(x, T, window, n_chunks, chunk) for x in (k, v))
    found = _sdpa(q, k, v, mask.chunked_band(window, B, q.device), scale=scale)
    return found.unflatten(0, (B, n_chunks)).flatten(1, 2)[:, :T]


def _attend_sums(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of one query to all of a few keys; products of so few numbers are sums."""
    q_BGRD = (q * scale).unflatten(2, (k.shape[2], -1))
    weights = (q_BGRD * k.unsqueeze(3)).sum(-1, keepdim=True, dtype=torch.float32).softmax(1)
    return (weights.to(v.dtype) * v.unsqueeze(3)).sum(1, keepdim=True).flatten(2, 3)


def _windows(x_BSGD: Tensor, T: int, window: int, n_chunks: int, chunk: int) -> Tensor:
    """The rows that each chunk of the last T positions sees, zeros outside: (B * chunks, chunk + window - 1, G, D)."""
    first = x_BSGD.shape[1] - T - window + 1
    end = (n_chunks + 1) * chunk - T - window + 1
    x = F.pad(x_BSGD[:, max(first, 0) :], (0, 0, 0, 0, max(-first, 0), end)).unflatten(1, (n_chunks + 1, chunk))
    return torch.cat([x[:, :-1], x[:, 1:, : window - 1]], dim=2).flatten(0, 1)


def _shifted(x_BSGD: Tensor, T: int, window: int) -> list[Tensor]:
    """For the last T positions, the rows ``window - 1``, ..., 1, 0 before them: (B, T, G, D) each, zeros before 0."""
    S = x_BSGD.shape[1]
    first = S - T - window + 1
    needed = F.pad(x_BSGD, (0, 0, 0, 0, -first, 0)) if first < 0 else x_BSGD[:, first:]
    return [needed[:, w : w + T] for w in range(window)]


def _rows_at(x_BSGD: Tensor, at: Tensor) -> Tensor:
    """Rows of ``x`` at positions (B or 1, T, W), negative ones clamped to 0: (B, T, W, G, D)."""
    at = at.clamp(min=0)
    if at.shape[0] == 1:
        return x_BSGD[:, at[0]]
    return x_BSGD[torch.arange(len(at), device=at.device)[:, None, None], at]


def document_starts(numbers: Tensor) -> Tensor | None:
    """Where the document of each token starts: (B, T) int64; None where no row holds more than one.

    Args:
        numbers: (B, T), 0 at padding, neighbours of one document with the same number; (B, T) bool says nothing of
            documents.
    """
    if numbers.dtype == torch.bool or bool((numbers <= 1).all()):
        return None
    begins = F.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0), value=True)
    return (begins * torch.arange(numbers.shape[1], device=numbers.device)).cummax(1).values


def causal_conv(x_BSC: Tensor, taps_KC: Tensor, starts_BS: Tensor | None = None) -> Tensor:
    """Depth-wise causal convolution ``y[s] = sum_k taps[k] * x[s - k]``, zeros before the first row.

    With ``starts_BS``, also zeros before the first row of each document.
    """
    if starts_BS is None:
        return conv_end(F.pad(x_BSC, (0, 0, len(taps_KC) - 1, 0)), taps_KC, x_BSC.shape[1])
    S = x_BSC.shape[1]
    since = torch.arange(S, device=x_BSC.device) - starts_BS
    out = x_BSC * taps_KC[0]
    for j in range(1, min(len(taps_KC), S)):
        before = F.pad(x_BSC[:, : S - j], (0, 0, j, 0)).masked_fill((since < j).unsqueeze(-1), 0)
        out = torch.addcmul(out, before, taps_KC[j])
    return out


def conv_end(x_BSC: Tensor, taps_KC: Tensor, n: int) -> Tensor:
    """The last ``n`` rows of a :func:`causal_conv`, from ``n + K - 1`` rows at least."""
    S = x_BSC.shape[1]
    out = x_BSC[:, S - n :] * taps_KC[0]
    for j in range(1, len(taps_KC)):
        out = torch.addcmul(out, x_BSC[:, S - n - j : S - j], taps_KC[j])
    return out


def convolved_window(x: Tensor, taps: Tensor, mask: CausalMask, window: int) -> tuple[Tensor, CausalMask]:
    """Of rows (B, S, ...) that ``taps`` (K, ...) have still to convolve, those that local heads see, and their mask."""
    n_seen, more = mask.n_new + window - 1, len(taps) - 1
    if x.shape[1] < n_seen + more:  # the text's start is in sight
        n_seen = min(n_seen, x.shape[1])
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (more, 0))
    return conv_end(x, taps, n_seen), mask.last(n_seen)
