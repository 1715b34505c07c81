"""Attention by PyTorch's fused kernels, with heads that see a window only.

Shape letters: B rows, T queries, S keys, H query heads, G key/value heads, D channels of a head, W window.
The slow, obvious twin is :func:`open_mythos.ops.reference.attention`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.context import CHUNK, AttentionMask

# Up to so many queries and keys, one call with a bias for each head is cheaper than one for each kind of heads.
ONE_CALL_QUERIES, ONE_CALL_KEYS = 64, 256


def attend(q: Tensor, kv: Tensor, mask: AttentionMask, scale: float, n_local: int = 0, window: int = 0) -> Tensor:
    """Softmax attention.

    Args:
        q: (B, T, H, D).
        kv: (B, S, G, D + Dv), keys and values next to each other, G dividing H and Dv at most D; or (B, S, G, D),
            rows that are both.
        mask: who sees whom.
        scale: of the scores.
        n_local: the first so many heads see keys nearer than ``window`` only.
        window: W.

    Returns:
        (B, T, H, Dv).
    """
    H, T, G = q.shape[2], q.shape[1], kv.shape[2]
    if n_local == 0:
        return sdpa(q, kv, *mask.sdpa(q), scale)
    is_dense = mask.positions is not None or mask.given is not None or not mask.causal
    if n_local == H:
        return _attend_window(q, kv, mask, scale, window, is_dense)
    if is_dense or (T <= ONE_CALL_QUERIES and kv.shape[1] <= ONE_CALL_KEYS):
        return sdpa(q, kv, mask.by_head(q, n_local, window), False, scale)
    # Two calls, each for whole groups of heads: a group that has heads of both kinds is in both.
    per_group = H // G if G > 1 else 1
    near_end, far_start = -(-n_local // per_group) * per_group, n_local // per_group * per_group
    near_groups, far_groups = slice(0, near_end // per_group), slice(far_start // per_group, None)
    if G == 1:
        near_groups = far_groups = slice(0, 1)
    near = _attend_window(q[:, :, :near_end], kv[:, :, near_groups], mask, scale, window, is_dense)
    far = sdpa(q[:, :, far_start:], kv[:, :, far_groups], *mask.sdpa(q), scale)
    return torch.cat([near[:, :, :n_local], far[:, :, n_local - far_start :]], 2)


def sdpa(q: Tensor, kv: Tensor, bias: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """PyTorch's attention for tensors as :func:`attend` takes them; ``bias`` broadcasts to (B, H, T, S)."""
    if q.device.type == "cpu" and q.dtype.itemsize < 4 and q.requires_grad:
        # The CPU's backward pass takes four times as long in half precision as in single.
        with torch.autocast("cpu", enabled=False):
            bias = None if bias is None else bias.float()
            return sdpa(q.float(), kv.float(), bias, is_causal, scale).to(q.dtype)
    D = q.shape[-1]
    k, v = (kv, kv) if kv.shape[-1] == D else kv.split([D, kv.shape[-1] - D], -1)
    Dv = v.shape[-1]
    if Dv < D:  # the kernels that keep no T x S scores want one width
        v = F.pad(v, (0, D - Dv))
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


def _attend_window(q: Tensor, kv: Tensor, mask: AttentionMask, scale: float, window: int, is_dense: bool) -> Tensor:
    """Every head sees keys nearer than ``window`` only; cost T * W, not T * S, where there are many queries or one."""
    T = q.shape[1]
    if T > ONE_CALL_QUERIES and not is_dense:
        return _attend_chunks(q, kv, mask, scale, window)
    if T == 1 and mask.is_full:
        return sdpa(q, kv[:, -window:], None, False, scale)
    return sdpa(q, kv, *mask.sdpa(q, window), scale)


def _attend_chunks(q: Tensor, kv: Tensor, mask: AttentionMask, scale: float, window: int) -> Tensor:
    """The last T positions, in chunks of queries and the keys that any of them sees."""
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
    """The rows that each chunk of the last T positions sees, zeros outside: (B * chunks, chunk + W - 1, G, D)."""
    first = x_BSGD.shape[1] - T - window + 1
    x_BSGD = F.pad(x_BSGD[:, max(first, 0) :], (0, 0, 0, 0, max(-first, 0), n_chunks * chunk - T))
    return x_BSGD.unfold(1, chunk + window - 1, chunk).movedim(-1, 2).flatten(0, 1)
