"""One transformer block."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.cache import KVCache, Slot
from open_mythos.config import MythosConfig
from open_mythos.context import Context, site
from open_mythos.nn.attention import GQAttention, MLAttention
from open_mythos.nn.feed_forward import Expert, MoEFFN
from open_mythos.nn.linear import RMSNorm
from open_mythos.nn.modes import is_evaluating
from open_mythos.ops.attention import AttentionMask
from open_mythos.ops.draws import uniform


class Dropout(nn.Dropout):
    """Dropout that :func:`~open_mythos.nn.modes.evaluating` also turns off."""

    is_stopped = True

    def forward(self, x: Tensor, keys: Tensor | None = None, site: int = 0) -> Tensor:
        """Dropout of ``x`` (B, ...), drawn with the ``keys`` of its rows at ``site``, or by torch if they are None."""
        if keys is None or not self.training or is_evaluating():
            return F.dropout(x, self.p, self.training and not is_evaluating(), self.inplace)
        return x * (uniform(keys, site, x) >= self.p) / (1 - self.p)


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream.

    Nothing here has a bias, so a padding token, which enters as zeros, stays zeros.

    Args:
        cfg: the model's config.
        use_moe: build a block of the recurrent kind: experts in place of the dense feed-forward if ``cfg.n_experts`` is
            above 0, and ``cfg.n_local_heads`` local heads.
    """

    def __init__(self, cfg: MythosConfig, use_moe: bool = False) -> None:
        super().__init__()
        n_layers = cfg.core_layers if use_moe else max(cfg.prelude_layers, cfg.coda_layers, 1)
        attention = GQAttention if cfg.attn_type == "gqa" else MLAttention
        self.attn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.attn = attention(cfg, local_window=cfg.local_window if use_moe else 0, n_layers=n_layers)
        self.ffn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        has_experts = use_moe and cfg.n_experts > 0
        self.ffn = MoEFFN(cfg) if has_experts else Expert(cfg.dim, cfg.ffn_dim, n_layers, cfg.weight_std)
        self.dropout = Dropout(cfg.dropout)

    def forward(
        self, x: Tensor, freqs: Context | Tensor, mask: AttentionMask | Tensor | None = None,
        kv_cache: KVCache | dict[str, Any] | None = None, cache_key: Slot | str = "default", last: int | None = None,
    ) -> Tensor:  # fmt: skip
        """(B, T, dim) -> (B, T or last, dim); arguments as :meth:`Attention.forward`."""
        attended = self.attn(self.attn_norm(x), freqs, mask, kv_cache, cache_key, last)
        keys = freqs.keys if isinstance(freqs, Context) and self.dropout.p else None
        at = 0 if keys is None or isinstance(cache_key, str) else site(cache_key)
        x = (x if last is None else x[:, -last:]) + self.dropout(attended, keys, at)
        return x + self.dropout(self.ffn(self.ffn_norm(x)), keys, at + 1)


class CoreBlocks(nn.ModuleList):
    """Several blocks of the recurrent kind that a loop runs in turn, called as one :class:`TransformerBlock` is.

    Args:
        cfg: the blocks' config.
        n: number of blocks; ``cfg.core_layers`` if None.
    """

    def __init__(self, cfg: MythosConfig, n: int | None = None) -> None:
        super().__init__(TransformerBlock(cfg, use_moe=True) for _ in range(n or cfg.core_layers))

    def forward(
        self, x: Tensor, freqs: Context | Tensor, mask: AttentionMask | Tensor | None = None,
        kv_cache: KVCache | dict[str, Any] | None = None, cache_key: Slot | str = "default",
    ) -> Tensor:  # fmt: skip
        """(B, T, dim) -> (B, T, dim); arguments as :meth:`TransformerBlock.forward`. Each block has its own slots."""
        for layer, block in enumerate(self):
            if layer:
                own = cache_key._replace(layer=layer) if isinstance(cache_key, Slot) else f"{cache_key}_layer_{layer}"
            x = block(x, freqs, mask, kv_cache, own if layer else cache_key)
        return x
