"""One transformer block."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from open_mythos.cache import Cache
from open_mythos.config import MythosConfig
from open_mythos.nn.active import ActiveTokens
from open_mythos.nn.feed_forward import Expert
from open_mythos.nn.gqa import GQAttention
from open_mythos.nn.mla import MLAttention
from open_mythos.nn.moe import MoEFFN
from open_mythos.nn.norm import RMSNorm
from open_mythos.ops.attention import CausalMask


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream.

    Nothing here has a bias, so a padding token, which enters as zeros, stays zeros.

    Args:
        cfg: the model's config.
        use_moe: the recurrent block's kind: experts in place of the dense feed-forward, and three
            quarters of the heads local if ``cfg.local_window`` is set.
    """

    def __init__(self, cfg: MythosConfig, use_moe: bool = False) -> None:
        super().__init__()
        n_layers = 1 if use_moe else max(cfg.prelude_layers, cfg.coda_layers, 1)
        attention = GQAttention if cfg.attn_type == "gqa" else MLAttention
        self.attn_norm = RMSNorm(cfg.dim)
        self.attn = attention(cfg, local_window=cfg.local_window if use_moe else 0, n_layers=n_layers)
        self.ffn_norm = RMSNorm(cfg.dim)
        self.ffn = MoEFFN(cfg) if use_moe else Expert(cfg.dim, cfg.ffn_dim, n_layers, cfg.weight_std)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(
        self,
        x: Tensor,
        freqs: Tensor,
        mask: CausalMask | None = None,
        kv_cache: Cache | dict[str, Any] | None = None,
        cache_key: str = "default",
        active: ActiveTokens | None = None,
    ) -> Tensor:
        """(B, T, dim) -> (B, T, dim); arguments as :meth:`CausalAttention.forward`."""
        x = x + self.dropout(self.attn(self.attn_norm(x), freqs, mask, kv_cache, cache_key, active))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))
