"""Attention: grouped-query or latent, with a short convolution before the cache, and local heads."""

from typing import Any

import torch
from torch import Tensor, nn

from open_mythos.cache import KVCache, Slot
from open_mythos.config import MythosConfig
from open_mythos.context import Context, as_context
from open_mythos.nn.linear import WEIGHT_STD, Linear, RMSNorm, call, project, residual_gain
from open_mythos.ops.attention import AttentionMask, attend
from open_mythos.ops.rope import apply_rope


class ShortConv(nn.Module):
    """The taps of a depth-wise convolution of keys and values over the last few tokens; ``forward`` returns them.

    The convolution mixes the previous token into each key and value, so that information can move by one position per
    loop without a head having to learn it (the idea of Canon layers, Allen-Zhu 2025).

    Like the matrices of :class:`~open_mythos.nn.linear.Linear`, taps are stored at the scale of ``std``.

    Args:
        channels: width of the rows.
        n_taps: tokens that each output reads, its own included.
        share: number of neighbouring channels that share taps; 2 for keys, whose channels are rotated in pairs: with
            different taps in a pair, scores would no longer depend on relative positions alone.
        std: see above.
    """

    def __init__(self, channels: int, n_taps: int, share: int = 1, std: float = WEIGHT_STD) -> None:
        super().__init__()
        self.share, self.std = share, std
        self.taps = nn.Parameter(torch.empty(n_taps, channels // share))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Near the identity, with some of the previous token mixed in."""
        start = torch.zeros_like(self.taps)
        start[0] = 1.0
        start[1:2] = 0.3
        with torch.no_grad():
            self.taps.normal_(std=0.1).add_(start).mul_(self.std)

    def forward(self) -> Tensor:
        """The taps of every channel, the token's own first: (n_taps, channels)."""
        taps = self.taps / self.std
        return taps if self.share == 1 else taps.unsqueeze(2).expand(-1, -1, self.share).flatten(1)


class Attention(nn.Module):
    """Base of :class:`GQAttention` and :class:`MLAttention`: projection, convolution, cache update, attention, output.

    A subclass says how tokens become queries and rows (:meth:`project`), how rows are convolved (:meth:`kernel`), and
    how queries attend to all rows (:meth:`read`). A row is (G, W): what attention reads of one token.

    Args:
        cfg: reads n_heads, n_local_heads, conv_taps.
        local_window: if above 0, ``cfg.n_local_heads`` of the heads see only tokens nearer than this.
    """

    wo: Linear

    def __init__(self, cfg: MythosConfig, local_window: int = 0) -> None:
        super().__init__()
        self.n_heads, self.n_taps = cfg.n_heads, cfg.conv_taps
        self.local_window = local_window
        self.n_local_heads = cfg.n_local_heads if local_window else 0

    def forward(
        self, x: Tensor, freqs: Context | Tensor, mask: AttentionMask | Tensor | None = None,
        kv_cache: KVCache | dict[str, Any] | None = None, cache_key: Slot | str = "default", last: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Attend.

        Args:
            x: tokens, (B, T, dim); or only the running ones, (1, N, dim), if the context's ``active`` packs them.
            freqs: the :class:`Context` of these tokens, which replaces mask and kv_cache; or their rotary phasors or
                (cos, sin) pairs, see :func:`open_mythos.ops.rope.apply_rope`. A table of more positions than tokens is
                read from the first position that is not cached.
            mask: which keys each query may attend to, see :func:`~open_mythos.context.as_mask`; causal if None.
            kv_cache: rows of earlier tokens; this call's are appended.
            cache_key: slot of the cache.
            last: how many of the last tokens are queries; all if None. The rows of all T are cached and attended to.

        Returns:
            The outputs of the tokens that are queries, in the shape of x.
        """
        ctx = freqs if isinstance(freqs, Context) else as_context(freqs, mask, kv_cache, cache_key, x.shape[1])
        mask, active = ctx.mask, ctx.active
        assert isinstance(mask, AttentionMask)
        queries, raw = self.project(x, ctx.rotary)
        layer = cache_key.layer if isinstance(cache_key, Slot) else cache_key
        if active is not None:
            queries, raw = [active.pack(q) for q in queries], active.merge_raw(layer, raw)
        if mask.valid is not None:
            # RMSNorm of an all-zero row multiplies gradients by a thousand, which overflows after a few loops.
            raw = mask.without_padding(raw)
        n_raw, before, slot = max(self.n_taps - 1, 0), None, None
        if ctx.cache is not None:
            slot, before = ctx.cache.open(cache_key, mask.first, n_raw)
        rows = self._convolve(raw, before, ctx, mask) if self.n_taps else raw
        if active is not None:
            rows = active.merge(layer, raw, rows)
        if slot is not None:
            rows = slot.update(rows, raw if self.n_taps else None, mask.first, n_raw)
        if last is not None and last < x.shape[1]:
            queries, mask = [q[:, -last:] for q in queries], mask.ending(last)
        out = self.read(queries, rows, mask)
        if mask.valid is not None and (active is None or not active.is_packed):  # padding halts after the first loop
            out = mask.without_padding(out)
        return call(self.wo, (active.unpack(out) if active is not None else out).flatten(2))

    def project(self, x: Tensor, rotary: Tensor) -> tuple[list[Tensor], Tensor]:
        """Queries, as a list of parts (B, T, H, ...), and raw rows (B, T, G, W)."""
        raise NotImplementedError

    def kernel(self, own: int = 0) -> Tensor:
        """Taps of every channel of a row: (n_taps, G, W); index ``own`` is the token's own tap."""
        raise NotImplementedError

    def read(self, queries: list[Tensor], rows: Tensor, mask: AttentionMask) -> Tensor:
        """Attention of the queries to all rows (B, S, G, W): (B, T, H, Dv)."""
        raise NotImplementedError

    def _convolve(self, raw: Tensor, before: Tensor | None, ctx: Context, mask: AttentionMask) -> Tensor:
        """``y[t] = sum_j taps[j] raw[t - j]`` in each document: (B, T, G, W); centred if attention is not causal."""
        K, T, constants = self.n_taps, raw.shape[1], ctx.constants
        ahead = 0 if mask.causal else (K - 1) // 2
        taps = None if constants is None else constants.get(self)
        if taps is None:
            by_tap = self.kernel(ahead)
            taps = by_tap.unbind(0), by_tap.flip(0)
            if constants is not None:
                constants[self] = taps
        kernel, reversed_kernel = taps
        if T == 1 and before is not None:
            return (torch.cat([before, raw], 1) * reversed_kernel).sum(1, keepdim=True)
        out = raw * kernel[ahead]
        for j in (j for j in range(K) if j != ahead):
            if before is None:
                if abs(j - ahead) > T:
                    continue
                shifted = nn.functional.pad(raw, (0, 0, 0, 0, j - ahead, ahead - j))
            else:
                shifted = torch.cat([before[:, K - 1 - j :], raw], 1)[:, :T]
            if mask.documents is not None:
                same = mask.documents == mask.documents.roll(j - ahead, 1)
                shifted = shifted * same.view(*same.shape, 1, 1)
            out = torch.addcmul(out, shifted, kernel[j])
        return out


class GQAttention(Attention):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) with rotary positions.

    A row holds, for each of ``n_kv_heads``, a rotated key and a value: (n_kv_heads, 2 head_dim).

    Args:
        cfg: reads dim, n_heads, n_kv_heads, conv_taps.
        local_window: see :class:`Attention`.
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

    def project(self, x: Tensor, rotary: Tensor) -> tuple[list[Tensor], Tensor]:
        q, k, v = project(x, self.wq, self.wk, self.wv)
        return self.rotate(torch.cat([q, k], -1), v, rotary)

    def rotate(self, qk: Tensor, v: Tensor, rotary: Tensor) -> tuple[list[Tensor], Tensor]:
        """:meth:`project`, given the products: concatenated queries and keys (B, T, (H + G) D), values (B, T, G D)."""
        q, k = apply_rope(qk.unflatten(-1, (-1, self.head_dim)), rotary).split([self.n_heads, self.n_kv_heads], 2)
        return [q], torch.cat([k, v.unflatten(-1, (-1, self.head_dim))], -1)

    def kernel(self, own: int = 0) -> Tensor:
        assert self.k_conv is not None and self.v_conv is not None
        taps = [conv().unflatten(1, (self.n_kv_heads, -1)) for conv in (self.k_conv, self.v_conv)]
        return torch.cat(taps, -1)

    def read(self, queries: list[Tensor], rows: Tensor, mask: AttentionMask) -> Tensor:
        return attend(queries[0], rows, mask, self.head_dim**-0.5, self.n_local_heads, self.local_window)


class LatentUp(Linear):
    """The map from a latent to ``n_heads`` keys and values; or, absorbed, from queries to latents and back to values.

    As ``q . (U c) = (U^T q) . c``, ``absorb="keys"`` maps queries (N, H, key_dim) to (N, H, in_features), and
    ``absorb="values"`` maps attention-weighted latents (N, H, in_features) to values (N, H, value_dim).

    Args:
        in_features: R, channels of a latent.
        n_heads, key_dim, value_dim: number of heads, and channels of a head's key and value.
        std: as :class:`Linear`.
    """

    def __init__(self, in_features: int, n_heads: int, key_dim: int, value_dim: int, std: float = WEIGHT_STD) -> None:
        super().__init__(in_features, n_heads * (key_dim + value_dim), std=std)
        self.n_heads, self.key_dim = n_heads, key_dim

    def forward(self, x: Tensor, scale: float | None = None, absorb: str = "") -> Tensor:
        if not absorb:
            return super().forward(x, scale)
        weight = self.weight.unflatten(0, (self.n_heads, -1))  # (H, key_dim + value_dim, R)
        weight = weight[:, : self.key_dim] if absorb == "keys" else weight[:, self.key_dim :].transpose(1, 2)
        ignored = weight.detach()[:1, :1, :1]
        return torch.baddbmm(ignored, x.transpose(0, 1), weight, beta=0, alpha=self.scale).transpose(0, 1)


class MLAttention(Attention):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Queries and keys/values pass through low-rank latents; positions are encoded in a separate rotary part, whose key
    is shared by all heads. A row holds only that latent and that key, (1, kv_lora_rank + qk_rope_head_dim).

    There are two ways to read it, equal up to rounding. *Expanded* turns every latent into the keys and values of
    all heads. *Absorbed* moves the expansion to the queries and the output, so that the latents are read as they are.
    :meth:`read` chooses the one with fewer multiplications: expanded for a long prompt, absorbed in decoding.

    Args:
        cfg: reads dim, n_heads, the five MLA sizes, conv_taps.
        local_window: see :class:`Attention`.
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
        self.kv_up = LatentUp(self.latent_dim, cfg.n_heads, self.nope_dim, self.v_dim, std=std)
        self.wo = Linear(cfg.n_heads * self.v_dim, cfg.dim, gain=residual_gain(n_layers), std=std)
        self.conv = ShortConv(self.latent_dim, cfg.conv_taps, std=std) if cfg.conv_taps else None

    def project(self, x: Tensor, rotary: Tensor) -> tuple[list[Tensor], Tensor]:
        q_latent, kv = project(x, self.q_down, self.kv_down)
        c_kv, k_rope = kv.split([self.latent_dim, self.rope_dim], dim=-1)
        return self.rotate(
            call(self.q_up, self.q_norm(q_latent.to(x.dtype))), self.kv_norm(c_kv.to(x.dtype)), k_rope, rotary
        )

    def rotate(self, q: Tensor, c_kv: Tensor, k_rope: Tensor, rotary: Tensor) -> tuple[list[Tensor], Tensor]:
        """:meth:`project`, given queries (B, T, H (N + P)), latents (B, T, R) and rotary keys (B, T, P)."""
        q_nope, q_rope = q.unflatten(-1, (self.n_heads, -1)).split([self.nope_dim, self.rope_dim], dim=-1)
        rotated = apply_rope(torch.cat([q_rope, k_rope.unsqueeze(2)], 2), rotary)
        q_rope, k_rope = rotated.split([self.n_heads, 1], 2)
        return [q_nope, q_rope], torch.cat([c_kv.unsqueeze(2), k_rope], -1)

    def kernel(self, own: int = 0) -> Tensor:
        assert self.conv is not None
        taps = self.conv()
        identity = taps.new_zeros(self.n_taps, self.rope_dim)  # rotary keys are not convolved
        identity[own] = 1
        return torch.cat([taps, identity], -1).unsqueeze(1)

    def read(self, queries: list[Tensor], rows: Tensor, mask: AttentionMask) -> Tensor:
        (q_nope, q_rope), n_all = queries, rows.shape[1]
        per_pair_expanded = self.nope_dim + self.rope_dim + self.v_dim
        per_pair_absorbed = self.rope_dim + 2 * self.latent_dim
        per_token = self.latent_dim * (self.nope_dim + self.v_dim)
        n_new = q_nope.shape[1]
        expanded = n_all * per_token + n_new * n_all * per_pair_expanded
        absorbed = n_new * per_token + n_new * n_all * per_pair_absorbed
        can_absorb = isinstance(self.kv_up, LatentUp)  # not if an adapter wraps it
        read = self.read_absorbed if can_absorb and absorbed < expanded else self.read_expanded
        return read(q_nope, q_rope, rows, mask)

    def read_expanded(self, q_nope: Tensor, q_rope: Tensor, rows: Tensor, mask: AttentionMask) -> Tensor:
        """Attention that expands every latent into the keys and values of H heads."""
        c_kv, k_rope = rows.split([self.latent_dim, self.rope_dim], -1)
        up = call(self.kv_up, c_kv.squeeze(2)).unflatten(-1, (self.n_heads, -1))
        k_nope, v = up.split([self.nope_dim, self.v_dim], dim=-1)
        q, kv = torch.cat([q_nope, q_rope], -1), [k_nope, k_rope.expand(-1, -1, self.n_heads, -1), v]
        return attend(q, torch.cat(kv, -1), mask, self.score_scale, self.n_local_heads, self.local_window)

    def read_absorbed(self, q_nope: Tensor, q_rope: Tensor, rows: Tensor, mask: AttentionMask) -> Tensor:
        """Attention with one shared head, whose keys are the rows, and whose values are the latents in them."""
        B, T = q_nope.shape[:2]
        q_latent = self.kv_up(q_nope.flatten(0, 1), absorb="keys").unflatten(0, (B, T))
        q = torch.cat([q_latent, q_rope], -1)
        mixed = attend(q, rows, mask, self.score_scale, self.n_local_heads, self.local_window)
        return self.kv_up(mixed[..., : self.latent_dim].flatten(0, 1), absorb="values").unflatten(0, (B, T))
