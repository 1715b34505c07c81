"""Grouped-query attention."""

from __future__ import annotations

from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.nn.attention import CausalAttention, Rows
from open_mythos.nn.conv import ShortConv
from open_mythos.nn.linear import Linear, residual_gain, side_by_side
from open_mythos.ops.mask import CausalMask
from open_mythos.ops.rope import apply_rope


class GQAttention(CausalAttention):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) with rotary positions.

    The cache holds ``k`` (rotated) and ``v``, each (B, S, n_kv_heads, head_dim).

    Args:
        cfg: reads dim, n_heads, n_kv_heads, conv_taps.
        local_window: see :class:`CausalAttention`.
        n_layers: depth of the stack it stands in.
    """

    def __init__(self, cfg: MythosConfig, local_window: int = 0, n_layers: int = 1) -> None:
        super().__init__(cfg, local_window)
        self.n_kv_heads, self.head_dim = cfg.n_kv_heads, cfg.head_dim
        std = cfg.weight_std
        kv_dim = cfg.n_kv_heads * cfg.head_dim
        self.wq = Linear(cfg.dim, cfg.dim, std=std)
        self.wk = Linear(cfg.dim, kv_dim, std=std)
        self.wv = Linear(cfg.dim, kv_dim, std=std)
        self.wo = Linear(cfg.dim, cfg.dim, gain=residual_gain(n_layers), std=std)
        self.k_conv = ShortConv(kv_dim, cfg.conv_taps, share=2, std=std) if cfg.conv_taps else None
        self.v_conv = ShortConv(kv_dim, cfg.conv_taps, std=std) if cfg.conv_taps else None

    def project(self, x: Tensor, freqs: Tensor) -> tuple[Tensor, Rows]:
        q, k, v = (rows.unflatten(-1, (-1, self.head_dim)) for rows in side_by_side(x, self.wq, self.wk, self.wv))
        return apply_rope(q, freqs), {"k": apply_rope(k, freqs), "v": v}

    def read(self, q: Tensor, rows: Rows, mask: CausalMask) -> Tensor:
        k, v = rows["k"], rows["v"]
        if self.k_conv is not None and self.v_conv is not None:
            if self.are_few(q, rows, mask):
                taps = self.k_conv.kernel().view(1, -1, *k.shape[2:]), self.v_conv.kernel().view(1, -1, *v.shape[2:])
                return self.attend(q, k, v, mask, taps=taps)
            k = self.k_conv(k.flatten(2), mask.starts).view_as(k)
            v = self.v_conv(v.flatten(2), mask.starts).view_as(v)
        return self.attend(q, k, v, mask)
