"""Plain, slow references of this package's fast operations, for tests: loops and explicit masks.

Each computes in the dtype it is given, keeps gradients, and shares no code with what it checks.

Shape letters: B rows, T queries, S keys, H query heads, G key/value heads, D and V channels of a key and a value
head, N content and P rotary channels of a latent head, R latent channels, C channels, K taps or experts per token,
E experts, F expert width, L loops.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def rope_complex(x: Tensor, positions: Tensor, theta: float, factor: float = 1.0, context: int = 8192) -> Tensor:
    """Channel pairs (2i, 2i+1) as complex numbers, times ``exp(i * position * theta ** (-2i / D))``.

    Args:
        x: (B, T, H, D).
        positions: (T,) or (B, T) integers.
        theta: base of the frequencies.
        factor, context: a pair that makes at most one turn in ``context`` positions is slowed ``factor`` times, one
            that makes four or more is not; in between, frequencies are interpolated linearly in the number of turns.

    Returns:
        (B, T, H, D).
    """
    D = x.shape[-1]
    frequencies = theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    for i, frequency in enumerate(frequencies.tolist()):
        turns = context * frequency / (2 * math.pi)
        share = min(max((turns - 1) / 3, 0.0), 1.0)
        frequencies[i] = share * frequency + (1 - share) * frequency / factor
    angles = positions.double()[..., None] * frequencies  # float32 is off by 1e-4 at a few thousand positions
    phasors = torch.polar(torch.ones_like(angles), angles)
    pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], D // 2, 2).contiguous())
    return torch.view_as_real(pairs * phasors[..., None, :]).flatten(-2).to(x.dtype)


def attention(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGV: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """Softmax attention written out.

    Args:
        q_BTHD: queries.
        k_BSGD: keys; every one is read by H / G neighbouring query heads.
        v_BSGV: values.
        allowed: bool, (T, S) or anything that broadcasts to (B, H, T, S); every query needs at least one True.
        scale: of the scores.

    Returns:
        (B, T, H, V).
    """
    n_heads, n_groups = q_BTHD.shape[2], k_BSGD.shape[2]
    group_of_head = [head * n_groups // n_heads for head in range(n_heads)]
    k_BSHD, v_BSHV = k_BSGD[:, :, group_of_head], v_BSGV[:, :, group_of_head]
    scores_BHTS = torch.einsum("bthd,bshd->bhts", q_BTHD, k_BSHD) * scale
    scores_BHTS = torch.where(allowed, scores_BHTS, -torch.inf)
    exp_BHTS = torch.exp(scores_BHTS - scores_BHTS.amax(-1, keepdim=True).detach())
    return torch.einsum("bhts,bshv->bthv", exp_BHTS / exp_BHTS.sum(-1, keepdim=True), v_BSHV)


def causal_conv(x_BSC: Tensor, taps_KC: Tensor) -> Tensor:
    """``y[s] = sum_k taps[k] * x[s - k]``, by a double loop: (B, S, C)."""
    out = []
    for s in range(x_BSC.shape[1]):
        y_BC = torch.zeros_like(x_BSC[:, s])
        for k in range(len(taps_KC)):
            if s - k >= 0:
                y_BC = y_BC + taps_KC[k] * x_BSC[:, s - k]
        out.append(y_BC)
    return torch.stack(out, 1)


def moe_loop(x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """Mixture of SwiGLU experts, one token and one choice at a time; arguments as ``ops.experts.grouped_swiglu``."""
    width = down_EDF.shape[-1]
    out = []
    for x_D, experts_K, weights_K in zip(x_ND, experts_NK.tolist(), weights_NK, strict=True):
        y_D = torch.zeros_like(x_D)
        for expert, weight in zip(experts_K, weights_K, strict=True):
            gate_FD, up_FD = gate_up_E2FD[expert, :width], gate_up_E2FD[expert, width:]
            y_D = y_D + weight * (down_EDF[expert] @ (F.silu(gate_FD @ x_D) * (up_FD @ x_D)))
        out.append(y_D)
    return torch.stack(out)


def mla_expanded(
    q_nope_BTHN: Tensor,
    q_rope_BTHP: Tensor,
    c_kv_BSR: Tensor,
    k_rope_BSP: Tensor,
    up_k_HNR: Tensor,
    up_v_HVR: Tensor,
    allowed: Tensor,
    scale: float,
) -> Tensor:
    """Latent attention with the keys and values of every head written out (DeepSeek-V2, arXiv:2405.04434, 2.1).

    Args:
        q_nope_BTHN: content part of the queries.
        q_rope_BTHP: rotary part, rotated.
        c_kv_BSR: latents.
        k_rope_BSP: the rotary key that all heads share, rotated.
        up_k_HNR: each head's map from latent to content key.
        up_v_HVR: each head's map from latent to value.
        allowed: as in :func:`attention`; (B, H, T, S), (B, 1, T, S) or (T, S).
        scale: of the scores.

    Returns:
        (B, T, H, V).
    """
    keys, values = [], []
    for up_k_NR, up_v_VR in zip(up_k_HNR, up_v_HVR, strict=True):
        keys.append(torch.cat([c_kv_BSR @ up_k_NR.T, k_rope_BSP], -1))
        values.append(c_kv_BSR @ up_v_VR.T)
    q_BTHD = torch.cat([q_nope_BTHN, q_rope_BTHP], -1)
    return attention(q_BTHD, torch.stack(keys, 2), torch.stack(values, 2), allowed, scale)
