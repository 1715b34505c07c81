"""Attention by PyTorch's kernels, and its mask in the form that each kernel takes.

Shape letters: B rows, T queries, S keys, H query heads, G key/value heads, D channels of a head, W window.
The plain, slow reference is :func:`open_mythos.ops.reference.attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from open_mythos.ops.dispatch import is_traced

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

CHUNK = 32  # queries in a chunk of windowed attention
# Up to this many queries, training on the CPU uses the math kernel, which keeps its probabilities. The other recomputes
# them from the scores, and at scores of a million, as after a far too large update, its gradients are noise.
EXACT_QUERIES = 16
# Up to this many queries and keys, one call with a bias for each head is cheaper than two, for local and other heads.
ONE_CALL_QUERIES, ONE_CALL_KEYS = 64, 256


@dataclass
class AttentionMask:
    """Which keys each query may attend to, as a predicate, and in the form that each attention kernel takes.

    A query sees every key of its document that is no padding, up to its own position if ``causal``; and always itself,
    so that no softmax is empty. Kernels take it as ``is_causal`` or a bias (:meth:`sdpa`), in chunks
    (:meth:`chunk_bias`), or as FlexAttention's block mask (:meth:`block_mask`).

    Args:
        n_queries: T.
        n_keys: S; query i stands at key position ``S - T + i`` unless ``positions`` says otherwise.
        valid: (B, S) bool, False at padding; None if there is none.
        documents: (B, S) integers, the document of each token; None if every row is one document.
        positions: (B, T) key position of each query, if the queries are not the last T tokens in order.
        first: key position of the first new token, at or after which all queries are; ``S - T`` if below 0.
        causal: False lets a query see later keys too.
        given: (B or 1, H or 1, T, S), added to the scores in place of the predicate.
    """

    n_queries: int
    n_keys: int
    valid: Tensor | None = None
    documents: Tensor | None = None
    positions: Tensor | None = None
    first: int = -1
    causal: bool = True
    given: Tensor | None = None

    def __post_init__(self) -> None:
        self.first = self.n_keys - self.n_queries if self.first < 0 else self.first
        # No field: FSDP copies the fields of a mask into another dtype, and what was made must not be copied with them.
        self._made: dict[Any, Any] = {}

    @property
    def is_same_for_all(self) -> bool:
        """Whether the mask is the same for every row of the batch."""
        return self.valid is None and self.documents is None and self.positions is None and self.given is None

    @property
    def is_full(self) -> bool:
        """Whether every query sees every key."""
        return self.is_same_for_all and (self.n_queries == 1 or not self.causal)

    @property
    def has_chunks(self) -> bool:
        """Whether :meth:`chunk_bias` supports the mask: causal, and the queries are the last T tokens in order."""
        return self.causal and self.positions is None and self.given is None

    def without_padding(self, x: Tensor) -> Tensor:
        """``x`` (B, n, ...) of the last n tokens with zeros at padding, through which no gradient passes either."""
        if self.valid is None:
            return x
        padding = ~self.valid[:, -x.shape[1] :]
        return x.masked_fill(padding.view(*padding.shape, *[1] * (x.ndim - 2)), 0)

    def allowed(self, query: Tensor, key: Tensor, window: int | None = None) -> Tensor:
        """The predicate, for positions (B or 1, T, 1) of queries, and (S,) or (B or 1, T, W) of keys, all in range."""
        seen = torch.ones_like(key <= query) if not self.causal else key <= query
        if window is not None:
            seen = seen & (key > query - window) & (key < query + window)
        if self.documents is not None:
            seen = seen & (_at(self.documents, query) == _at(self.documents, key))
        if self.valid is not None:
            seen = seen & _at(self.valid, key)
        return seen | (key == query)

    def sdpa(self, like: Tensor, window: int | None = None) -> tuple[Tensor | None, bool]:
        """Bias (B or 1, 1, T, S) in the dtype of ``like``, or None, and ``is_causal``, as SDPA takes them."""
        if self.is_same_for_all and window is None and (self.is_full or self.n_queries == self.n_keys):
            return None, not self.is_full
        return self._once(("bias", window, like.dtype), lambda: self._bias(like, window)), False

    def by_head(self, like: Tensor, n_local: int, window: int) -> Tensor:
        """Bias (B or 1, H, T, S) for queries ``like`` (B, T, H, D) whose first ``n_local`` heads are local."""

        def make() -> Tensor:
            near, far = (self._bias(like, w) for w in (window, None))
            near, far = (x.expand(-1, like.shape[2], -1, -1) if x.shape[1] == 1 else x for x in (near, far))
            return torch.cat([near[:, :n_local], far[:, n_local:]], 1)

        return self._once(("heads", n_local, window, like.dtype), make)

    def chunk_bias(self, like: Tensor, window: int, chunk: int) -> Tensor:
        """(B or 1, chunks, 1, chunk, chunk + W - 1): the bias between each chunk of queries and the keys in its window.

        Only for masks with :attr:`has_chunks`.
        """

        def make() -> Tensor:
            n_chunks = -(-self.n_queries // chunk)
            first = torch.arange(n_chunks, device=like.device)[:, None, None] * chunk + self.n_keys - self.n_queries
            query = first + torch.arange(chunk, device=like.device)[:, None]  # (chunks, chunk, 1)
            key = first - window + 1 + torch.arange(chunk + window - 1, device=like.device)
            key = key.expand(-1, chunk, -1)
            exists = (key >= 0) & (key < self.n_keys)
            shape = (1, n_chunks * chunk, -1)
            inside = [x.clamp(0, self.n_keys - 1).reshape(shape) for x in (query, key)]
            seen = self.allowed(inside[0], inside[1], window).unflatten(1, (n_chunks, chunk)) & exists
            return _as_bias(seen | (key == query), like.dtype).unsqueeze(2)

        return self._once(("chunks", window, chunk, like.dtype), make)

    def block_mask(
        self,
        window: int | None = None,
        n_local: int = 0,
        n_heads: int | None = None,
        device: torch.device | str = "cpu",
    ) -> BlockMask:
        """The mask for FlexAttention; ``window`` applies to the first ``n_local`` of ``n_heads``, or to all if 0."""
        from torch.nn.attention.flex_attention import create_block_mask

        assert self.given is None, "FlexAttention takes a predicate"
        valid, documents, positions, start = self.valid, self.documents, self.positions, self.n_keys - self.n_queries

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            at = q + start if positions is None else positions[b, q]
            seen = (k <= at) if self.causal else (k == k)
            if window is not None:
                near = (k > at - window) & (k < at + window)
                seen = seen & (near | (h >= n_local) if n_local else near)
            if documents is not None:
                seen = seen & (documents[b, at] == documents[b, k])
            if valid is not None:
                seen = seen & valid[b, k]
            return seen | (k == at)

        rows = next((len(x) for x in (valid, documents, positions) if x is not None), None)
        heads = n_heads if n_local else None
        return create_block_mask(sees, rows, heads, self.n_queries, self.n_keys, device=device)

    def ending(self, n_queries: int) -> AttentionMask:
        """The mask of the last ``n_queries`` alone, over the same keys; only if queries are the last T tokens."""
        assert self.positions is None and n_queries <= self.n_queries
        given = None if self.given is None else self.given[..., -n_queries:, :]
        return replace(self, n_queries=n_queries, given=given)

    def rows(self, which: slice | Tensor) -> AttentionMask:
        """The mask of some rows of the batch."""
        if self.is_same_for_all:
            return self
        valid, documents, positions = (
            None if x is None else x[which] for x in (self.valid, self.documents, self.positions)
        )
        given = self.given if self.given is None or len(self.given) == 1 else self.given[which]
        return replace(self, valid=valid, documents=documents, positions=positions, given=given)

    def _bias(self, like: Tensor, window: int | None) -> Tensor:
        query = self.positions
        if query is None:
            query = torch.arange(self.n_keys - self.n_queries, self.n_keys, device=like.device).unsqueeze(0)
        query, key = query.unsqueeze(-1), torch.arange(self.n_keys, device=like.device)
        if self.given is None:
            return _as_bias(self.allowed(query, key, window), like.dtype).unsqueeze(1)
        given = self.given.to(like.dtype)
        if self.positions is not None:  # ``given`` has all new tokens, in order, and queries are some of them
            at = (self.positions - self.first)[:, None, :, None]
            given = given.expand(len(at), -1, -1, -1)
            given = given.gather(2, at.expand(-1, given.shape[1], -1, given.shape[3]))
        if window is None:
            return given
        return given + _as_bias((key > query - window) & (key < query + window), like.dtype).unsqueeze(1)

    def _once(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        if is_traced():  # compiled code that found a value kept by another would be recompiled
            return make()
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def _at(x_BS: Tensor, positions: Tensor) -> Tensor:
    """``x`` at positions (S,), (B or 1, T, 1) or (B or 1, T, W)."""
    if positions.ndim == 1:
        return x_BS[:, positions].unsqueeze(1)
    positions = positions.expand(len(x_BS), -1, -1)
    return x_BS.gather(1, positions.flatten(1)).view(positions.shape)


def _as_bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def as_mask(mask: AttentionMask | Tensor | None, n_queries: int, n_keys: int) -> AttentionMask:
    """A mask for an attention layer that is called by itself: plain causal if None.

    Args:
        mask: None; or a tensor that broadcasts to (B, H, T, S): bool, True where a query may attend, or numbers that
            are added to the scores, as for :func:`torch.nn.functional.scaled_dot_product_attention`.
        n_queries, n_keys: T and S.

    Raises:
        ValueError: for anything else, or a shape that does not fit.
    """
    if isinstance(mask, AttentionMask):
        return mask
    if mask is None:
        return AttentionMask(n_queries, n_keys)
    if not isinstance(mask, Tensor) or mask.ndim < 2 or mask.shape[-2:] != (n_queries, n_keys):
        what = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"mask is {what}; pass a bool or additive mask whose shape ends in ({n_queries}, {n_keys}), or None for "
            f"causal attention"
        )
    bias = _as_bias(mask, torch.float32) if mask.dtype == torch.bool else mask
    return AttentionMask(n_queries, n_keys, given=bias.view(*[1] * (4 - mask.ndim), *mask.shape))


def ends_in_padding(valid: Tensor) -> bool:
    """Whether any row ends in padding and has a real token before it."""
    return bool((valid.any(1) & ~valid[:, -1]).any())


def has_documents(attention_mask: Tensor | None) -> bool:
    """Whether ``attention_mask`` numbers documents packed in rows, 1, 2, ..., rather than only marking padding."""
    return attention_mask is not None and attention_mask.dtype != torch.bool and bool((attention_mask > 1).any())


def document_starts(numbers: Tensor) -> Tensor:
    """(B, T) bool, True at the first token of each document, given the document's number at every token."""
    return F.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0), value=True)


def document_numbers(attention_mask: Tensor) -> Tensor | None:
    """(B, T) numbers of documents packed in rows; None if ``attention_mask`` only marks padding."""
    return document_starts(attention_mask).cumsum(1) if has_documents(attention_mask) else None


def attend(q: Tensor, kv: Tensor, mask: AttentionMask, scale: float, n_local: int = 0, window: int = 0) -> Tensor:
    """Softmax attention.

    Args:
        q: (B, T, H, D).
        kv: (B, S, G, D + Dv), concatenated keys and values, G dividing H and Dv at most D; or (B, S, G, D),
            rows that are both.
        mask: which keys each query may attend to.
        scale: factor of the scores.
        n_local: the first this many heads see only keys nearer than ``window``.
        window: W.

    Returns:
        (B, T, H, Dv).
    """
    H, T, G = q.shape[2], q.shape[1], kv.shape[2]
    if n_local == 0:
        return sdpa(q, kv, *mask.sdpa(q), scale)
    if n_local == H:
        return _attend_window(q, kv, mask, scale, window)
    if not mask.has_chunks or (T <= ONE_CALL_QUERIES and kv.shape[1] <= ONE_CALL_KEYS):
        return sdpa(q, kv, mask.by_head(q, n_local, window), False, scale)
    # Two calls, each for whole groups of heads: a group with heads of both kinds is computed in both.
    per_group = H // G if G > 1 else 1
    near_end, far_start = -(-n_local // per_group) * per_group, n_local // per_group * per_group
    near_groups, far_groups = slice(0, near_end // per_group), slice(far_start // per_group, None)
    if G == 1:
        near_groups = far_groups = slice(0, 1)
    near = _attend_window(q[:, :, :near_end], kv[:, :, near_groups], mask, scale, window)
    far = sdpa(q[:, :, far_start:], kv[:, :, far_groups], *mask.sdpa(q), scale)
    return torch.cat([near[:, :, :n_local], far[:, :, n_local - far_start :]], 2)


def sdpa(q: Tensor, kv: Tensor, bias: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """PyTorch's attention, on tensors as :func:`attend` takes them; ``bias`` broadcasts to (B, H, T, S)."""
    if q.device.type == "cpu" and q.dtype.itemsize < 4 and q.requires_grad:
        # The CPU's backward pass takes four times as long in half precision as in single.
        with torch.autocast("cpu", enabled=False):
            bias = None if bias is None else bias.float()
            return sdpa(q.float(), kv.float(), bias, is_causal, scale).to(q.dtype)
    if q.device.type == "cpu" and q.requires_grad and q.shape[1] <= EXACT_QUERIES and not is_traced():
        with sdpa_kernel(SDPBackend.MATH):
            return _sdpa(q, kv, bias, is_causal, scale)
    return _sdpa(q, kv, bias, is_causal, scale)


def _sdpa(q: Tensor, kv: Tensor, bias: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    D = q.shape[-1]
    k, v = (kv, kv) if kv.shape[-1] == D else kv.split([D, kv.shape[-1] - D], -1)
    Dv = v.shape[-1]
    if Dv < D:  # the memory-efficient kernels require one width
        v = F.pad(v, (0, D - Dv))
    if bias is not None and q.shape[2] != k.shape[2] and q.device.type != "cpu":
        return _ungrouped(q, k, v, bias, scale)[..., :Dv]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=bias,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)[..., :Dv]


def _ungrouped(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attention with grouped heads by kernels without groups: no memory-efficient GPU kernel takes groups and a bias.

    With one query, the heads of a group are treated as queries of one head, and no key or value is copied.
    """
    (B, T, H, _), G = q.shape, k.shape[2]
    if T > 1:
        k, v = (x.unsqueeze(3).expand(-1, -1, -1, H // G, -1).flatten(2, 3) for x in (k, v))
    else:
        q = q.reshape(B, G, H // G, -1).transpose(1, 2)
        bias = bias if bias.shape[1] == 1 else bias.reshape(len(bias), G, H // G, -1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=False, scale=scale)
    return out.transpose(1, 2) if T > 1 else out.reshape(B, 1, H, -1)


def _attend_window(q: Tensor, kv: Tensor, mask: AttentionMask, scale: float, window: int) -> Tensor:
    """Attention to keys nearer than ``window`` only; costs T * W, not T * S, if there are many queries or one."""
    T = q.shape[1]
    if T > ONE_CALL_QUERIES and mask.has_chunks:
        return _attend_chunks(q, kv, mask, scale, window)
    if T == 1 and mask.is_full:
        return sdpa(q, kv[:, -window:], None, False, scale)
    return sdpa(q, kv, *mask.sdpa(q, window), scale)


def _attend_chunks(q: Tensor, kv: Tensor, mask: AttentionMask, scale: float, window: int) -> Tensor:
    """Windowed attention of the last T positions, in chunks of queries with the keys that any of them sees."""
    B, T = q.shape[:2]
    chunk = max(CHUNK, window - 1)
    n_chunks = -(-T // chunk)
    if n_chunks * chunk > T:
        q = F.pad(q, (0, 0, 0, 0, 0, n_chunks * chunk - T))
    bias = mask.chunk_bias(q, window, chunk).expand(B, -1, -1, -1, -1).flatten(0, 1)
    q_chunks = q.unflatten(1, (n_chunks, chunk)).flatten(0, 1)
    out = sdpa(q_chunks, _windows(kv, T, window, chunk, n_chunks), bias, False, scale)
    return out.unflatten(0, (B, n_chunks)).flatten(1, 2)[:, :T]


def _windows(x_BSGD: Tensor, T: int, window: int, chunk: int, n_chunks: int) -> Tensor:
    """The rows that each chunk of queries sees, zeros where there are none: (B * chunks, chunk + W - 1, G, D)."""
    first = x_BSGD.shape[1] - T - window + 1
    x_BSGD = F.pad(x_BSGD[:, max(first, 0) :], (0, 0, 0, 0, max(-first, 0), n_chunks * chunk - T))
    return x_BSGD.unfold(1, chunk + window - 1, chunk).movedim(-1, 2).flatten(0, 1)
