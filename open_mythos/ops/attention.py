"""Causal attention for queries that are the last tokens, or any subset of the last tokens, of the keys.

Shape letters: B rows, T queries, S keys, H query heads, G key/value heads, D channels of a head, W window.
The slow, obvious twin is :func:`open_mythos.ops.reference.attention`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.ops.conv import window_end
from open_mythos.ops.mask import CausalMask


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


def attend_local_convolved(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_taps: Tensor,
    v_taps: Tensor,
    window: int,
    mask: CausalMask,
    scale: float | None = None,
    beside: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """:func:`attend_local` to keys and values that are convolved as those of :func:`attend_convolved`."""
    if not mask.is_last:
        near = mask.near(window, len(k_taps) - 1)
        k, v = k[:, -near.n_keys :], v[:, -near.n_keys :]
        beside = None if beside is None else (beside[0], beside[1][:, -near.n_keys :])
        return attend_convolved(q, k, v, k_taps, v_taps, near, scale, beside)
    # For one query a window of rows takes fewer operations to convolve than a convolution to move.
    same, k = v is k, window_end(k, k_taps, window)
    v = k if same else window_end(v, v_taps, window)
    if beside is not None:
        q, k = torch.cat([q, beside[0]], -1), torch.cat([k, beside[1][:, -k.shape[1] :]], -1)
    return attend_local(q, k, v, window, CausalMask(1, k.shape[1]), scale)


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
