"""Multi-head latent attention."""

from __future__ import annotations

import torch
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.nn.attention import CausalAttention, Rows
from open_mythos.nn.conv import ShortConv
from open_mythos.nn.linear import Linear, apply, effective_weight, residual_gain, side_by_side
from open_mythos.nn.norm import RMSNorm
from open_mythos.ops.attention import attend_convolved, attend_local_convolved
from open_mythos.ops.attention_kernel import attend_few, is_native_for_few
from open_mythos.ops.mask import CausalMask
from open_mythos.ops.rope import apply_rope


class MLAttention(CausalAttention):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Queries and keys/values pass through low-rank latents; position travels on a separate rotary part, whose key
    is one for all heads. The cache holds that latent, ``c_kv`` (B, S, kv_lora_rank), and that key, ``k_rope``
    (B, S, qk_rope_head_dim), and nothing else.

    There are two ways to read it, equal up to rounding. *Expanded* turns every latent into the keys and values of
    all heads. *Absorbed* moves the expansion to the queries and the output, so the latents are read as they are.
    :meth:`read` takes whichever needs fewer multiplications: expanded for a long prompt, absorbed in decoding.

    Args:
        cfg: reads dim, n_heads, the five MLA sizes, conv_taps.
        local_window: see :class:`CausalAttention`.
        n_layers: depth of the stack it stands in.
    """

    def __init__(self, cfg: MythosConfig, local_window: int = 0, n_layers: int = 1) -> None:
        super().__init__(cfg, local_window)
        std = cfg.weight_std
        self.nope_dim, self.rope_dim, self.v_dim = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
        self.latent_dim = cfg.kv_lora_rank
        self.score_scale = (self.nope_dim + self.rope_dim) ** -0.5
        self.q_down = Linear(cfg.dim, cfg.q_lora_rank, std=std)
        self.q_norm = RMSNorm(cfg.q_lora_rank, cfg.norm_eps)
        self.q_up = Linear(cfg.q_lora_rank, cfg.n_heads * (self.nope_dim + self.rope_dim), std=std)
        self.kv_down = Linear(cfg.dim, self.latent_dim + self.rope_dim, std=std)
        self.kv_norm = RMSNorm(self.latent_dim, cfg.norm_eps)
        self.kv_up = Linear(self.latent_dim, cfg.n_heads * (self.nope_dim + self.v_dim), std=std)
        self.wo = Linear(cfg.n_heads * self.v_dim, cfg.dim, gain=residual_gain(n_layers), std=std)
        self.conv = ShortConv(self.latent_dim, cfg.conv_taps, std=std) if cfg.conv_taps else None

    def project(self, x: Tensor, freqs: Tensor) -> tuple[Tensor, Rows]:
        q_latent, kv = side_by_side(x, self.q_down, self.kv_down)
        q = apply(self.q_up, self.q_norm(q_latent)).unflatten(-1, (self.n_heads, self.nope_dim + self.rope_dim))
        q_nope, q_rope = q.split([self.nope_dim, self.rope_dim], dim=-1)
        c_kv, k_rope = kv.split([self.latent_dim, self.rope_dim], dim=-1)
        k_rope = apply_rope(k_rope.unsqueeze(2), freqs).squeeze(2)
        return torch.cat([q_nope, apply_rope(q_rope, freqs)], -1), {"c_kv": self.kv_norm(c_kv), "k_rope": k_rope}

    def read(self, q: Tensor, rows: Rows, mask: CausalMask) -> Tensor:
        n_new, n_all = q.shape[1], rows["c_kv"].shape[1]
        per_pair_expanded = self.nope_dim + self.rope_dim + self.v_dim
        per_pair_absorbed = self.rope_dim + 2 * self.latent_dim
        per_token = self.latent_dim * (self.nope_dim + self.v_dim)
        expanded = n_all * per_token + n_new * n_all * per_pair_expanded
        absorbed = n_new * per_token + n_new * n_all * per_pair_absorbed
        return self.read_absorbed(q, rows, mask) if absorbed < expanded else self.read_expanded(q, rows, mask)

    def read_expanded(self, q: Tensor, rows: Rows, mask: CausalMask) -> Tensor:
        """Every latent becomes H keys and values."""
        up = apply(self.kv_up, self._mixed_latents(rows, mask)).unflatten(-1, (self.n_heads, -1))
        k_nope, v = up.split([self.nope_dim, self.v_dim], dim=-1)
        k_rope = rows["k_rope"].unsqueeze(2).expand(-1, -1, self.n_heads, -1)
        return self.attend(q, torch.cat([k_nope, k_rope], -1), v, mask, self.score_scale)

    def read_absorbed(self, q: Tensor, rows: Rows, mask: CausalMask) -> Tensor:
        """The latents are the keys and values of one shared head: ``q^T (U c) = (U^T q)^T c``."""
        up_k, up_v = self.up_projections()
        q_nope, q_rope = q.split([self.nope_dim, self.rope_dim], dim=-1)
        q_latent = torch.einsum("bthd,hdr->bthr", q_nope, up_k)
        few = self.conv is not None and self.are_few(q, rows, mask)
        taps = self.conv.kernel() if self.conv is not None and few else None
        if not few:
            rows = {"c_kv": self._mixed_latents(rows, mask), "k_rope": rows["k_rope"]}
        return torch.einsum("bthr,hdr->bthd", self.read_latents(q_latent, q_rope, rows, mask, taps), up_v)

    def read_latents(
        self, q_latent: Tensor, q_rope: Tensor, rows: Rows, mask: CausalMask, taps: Tensor | None
    ) -> Tensor:
        """What queries find in latents, which ``taps`` (K, R) have still to convolve unless None: (B, T, H, R).

        With taps, which are for few queries, nothing of the cache's length is written.
        """
        c_kv, k_rope, found, n = rows["c_kv"], rows["k_rope"], [], self.n_local_heads
        if taps is None:
            keys = torch.cat([c_kv, k_rope], -1).unsqueeze(2)
            return self.attend(torch.cat([q_latent, q_rope], -1), keys, c_kv.unsqueeze(2), mask, self.score_scale)
        c_kv, k_rope, taps = c_kv.unsqueeze(2), k_rope.unsqueeze(2), taps.unsqueeze(1)
        read = c_kv, c_kv, taps, taps
        if is_native_for_few(q_latent, mask):
            beside = q_rope, k_rope
            return attend_few(q_latent, *read, mask, self.score_scale, n, self.local_window, beside)
        if n:
            q, beside = q_latent[:, :, :n], (q_rope[:, :, :n], k_rope)
            found.append(attend_local_convolved(q, *read, self.local_window, mask, self.score_scale, beside))
        if n < self.n_heads:
            q, beside = q_latent[:, :, n:], (q_rope[:, :, n:], k_rope)
            found.append(attend_convolved(q, *read, mask, self.score_scale, beside))
        return found[0] if len(found) == 1 else torch.cat(found, dim=2)

    def _mixed_latents(self, rows: Rows, mask: CausalMask) -> Tensor:
        """Latents after the short convolution: (B, S, R)."""
        return rows["c_kv"] if self.conv is None else self.conv(rows["c_kv"], mask.starts)

    def up_projections(self) -> list[Tensor]:
        """Key part (H, nope_dim, R) and value part (H, v_dim, R) of ``kv_up``."""
        weight = effective_weight(self.kv_up).unflatten(0, (self.n_heads, self.nope_dim + self.v_dim))
        return list(weight.split([self.nope_dim, self.v_dim], dim=1))
