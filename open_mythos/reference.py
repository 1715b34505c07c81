"""The whole model written in the plainest way from a model's parameters, for tests. Nothing in the library imports it.

No cache, no packing, no grouped product, no fused kernel: every position is computed at every loop, and what halting
or padding leaves out is put back by ``torch.where``. Slow, and differentiable in every parameter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.model import OpenMythos
from open_mythos.nn.block import TransformerBlock
from open_mythos.nn.conv import ShortConv
from open_mythos.nn.feed_forward import Expert
from open_mythos.nn.gqa import GQAttention
from open_mythos.nn.halting import ACTHalting
from open_mythos.nn.linear import Linear
from open_mythos.nn.lora import LoRAAdapter
from open_mythos.nn.mla import MLAttention
from open_mythos.nn.moe import MoEFFN
from open_mythos.nn.norm import RMSNorm
from open_mythos.ops import reference


def reference_logits(
    model: OpenMythos, input_ids: Tensor, n_loops: int | None = None, attention_mask: Tensor | None = None
) -> Tensor:
    """What ``model(input_ids, n_loops, attention_mask=attention_mask)`` should return.

    Follows ``model.training``: in training no position halts, in eval mode they do if ``cfg.halting`` is set. A
    halted position keeps its state, and the others go on seeing its keys and values of the last loop that it ran.

    Args:
        model: whose parameters, buffers and config to use; it is not called and not changed.
        input_ids: (B, T).
        n_loops: ``cfg.max_loop_iters`` if None.
        attention_mask: (B, T), 0 at padding, or the numbers of documents, each of which is then computed alone.

    Returns:
        (B, T, vocab_size); at padding it means nothing.

    Raises:
        ValueError: in training mode with dropout or noise, which have no reference.
    """
    cfg = model.cfg
    noisy = cfg.dropout or cfg.state_noise or cfg.state_init == "noise"
    if model.training and noisy:
        raise ValueError(
            f"dropout={cfg.dropout}, state_noise={cfg.state_noise}, state_init={cfg.state_init!r} draw noise"
        )
    if attention_mask is not None and attention_mask.max() > 1:
        return _document_by_document(model, input_ids, n_loops, attention_mask)
    real_BT = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    where = Positions(real_BT, (real_BT.cumsum(1) - 1).clamp(min=0), cfg.rope[1:])

    x = model.embed.weight[input_ids] * math.sqrt(cfg.dim)
    x = torch.where(real_BT[..., None], x, 0.0)
    for block in model.prelude:
        x, _ = _block(block, x, where)
    e = _norm(model.input_norm, x) if isinstance(model.input_norm, RMSNorm) else x
    loops = _mixture if cfg.recurrence == "mixture" else _loops
    h = loops(model, e, where, cfg.max_loop_iters if n_loops is None else n_loops)
    for block in model.coda:
        h, _ = _block(block, h, where)
    return _norm(model.norm, h) @ model.head.weight.T


def _document_by_document(model: OpenMythos, input_ids: Tensor, n_loops: int | None, numbers_BT: Tensor) -> Tensor:
    rows = []
    for ids, numbers in zip(input_ids, numbers_BT, strict=True):
        lengths = numbers.unique_consecutive(return_counts=True)[1].tolist()
        alone = [reference_logits(model, document[None], n_loops)[0] for document in ids.split(lengths)]
        rows.append(torch.cat(alone))
    return torch.stack(rows)


@dataclass
class Positions:
    """What attention needs to know of the tokens: which are real (B, T), their positions (B, T), ``cfg.rope[1:]``."""

    real_BT: Tensor
    index_BT: Tensor
    rope: tuple[float, float, int]

    def allowed(self, n_heads: int, n_local_heads: int, window: int) -> Tensor:
        """(B, H, T, T) bool: real keys no later than the query, in the first heads within ``window``; always itself."""
        T = self.real_BT.shape[1]
        query, key = torch.arange(T)[:, None], torch.arange(T)[None, :]
        causal = key <= query
        local = causal & (key > query - window)
        by_head_HTS = torch.stack([local if head < n_local_heads else causal for head in range(n_heads)])
        return (by_head_HTS[None] & self.real_BT[:, None, None, :]) | (key == query)


def _loops(model: OpenMythos, e: Tensor, where: Positions, n_loops: int) -> Tensor:
    cfg, recurrent = model.cfg, model.recurrent
    h = e if cfg.state_init == "input" else torch.zeros_like(e)
    running = where.real_BT
    mass = torch.zeros(running.shape)
    rows: list[dict[str, Tensor] | None] = [None for _ in recurrent.layers]
    for loop in range(n_loops):
        u = recurrent.injection.get_A() * h + recurrent.injection.B * e
        if cfg.loop_index_dim:
            u = torch.where(where.real_BT[..., None], u + _loop_code(loop, cfg.loop_index_dim, cfg.dim), u)
        for layer, block in enumerate(recurrent.layers):
            u, rows[layer] = _block(block, u, where, running, rows[layer])
        if recurrent.lora is not None:
            u = u + _lora(recurrent.lora, e, loop)
        if isinstance(recurrent.norm, RMSNorm):
            u = _norm(recurrent.norm, u)
        before, h = h, torch.where(running[..., None], u, h)
        if cfg.halting and not model.training:
            mass = mass + torch.where(running, _gate(recurrent.act, before, h).detach(), 0.0)
            running = running & (mass < cfg.act_threshold)
    return h


def _mixture(model: OpenMythos, e: Tensor, where: Positions, n_loops: int) -> Tensor:
    cfg, recurrent = model.cfg, model.recurrent
    h = e if cfg.state_init == "input" else torch.zeros_like(e)
    mixed, spent = torch.zeros_like(e), torch.zeros(e.shape[:2])
    running = where.real_BT
    rows: dict[str, Tensor] | None = None
    for loop in range(n_loops):
        x = h + e
        if cfg.loop_index_dim:
            x = torch.where(where.real_BT[..., None], x + _loop_code(loop, cfg.loop_index_dim, cfg.dim), x)
        if isinstance(recurrent.norm, RMSNorm):
            x = _norm(recurrent.norm, x)
        x, rows = _block(recurrent.block, x, where, running, rows)
        if recurrent.lora is not None:
            x = x + _lora(recurrent.lora, x, loop)
        new = recurrent.injection.get_A() * h + recurrent.injection.B * e + x
        h = torch.where(running[..., None], new, h)
        share = torch.sigmoid(h @ recurrent.act.halt.weight[0] + recurrent.act.halt.bias)
        ends = spent + share >= cfg.act_threshold
        weight = torch.where(ends, 1 - spent, share) * (spent < cfg.act_threshold)
        mixed = mixed + weight[..., None] * h
        spent = torch.where(spent < cfg.act_threshold, spent + share, spent)
        if cfg.halting and not model.training:
            running = running & (spent < cfg.act_threshold)
    return mixed


def _block(
    block: nn.Module,
    x: Tensor,
    where: Positions,
    running: Tensor | None = None,
    rows: dict[str, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The block's output (B, T, dim), and the key/value rows that it read.

    ``rows`` are those of the loop before, kept where ``running`` (B, T) is False.
    """
    assert isinstance(block, TransformerBlock)
    read = _gqa if isinstance(block.attn, GQAttention) else _mla
    found, rows = read(block.attn, _norm(block.attn_norm, x), where, running, rows)  # type: ignore[arg-type]
    x = x + found
    feed_forward = _moe if isinstance(block.ffn, MoEFFN) else _expert
    return x + feed_forward(block.ffn, _norm(block.ffn_norm, x)), rows  # type: ignore[arg-type]


def _gqa(
    attn: GQAttention, x: Tensor, where: Positions, running: Tensor | None, old: dict[str, Tensor] | None
) -> tuple[Tensor, dict[str, Tensor]]:
    q = _heads(_linear(attn.wq, x), attn.n_heads)
    k = _heads(_linear(attn.wk, x), attn.n_kv_heads)
    rows = {
        "k": reference.rope_complex(k, where.index_BT, *where.rope).flatten(2),
        "v": _linear(attn.wv, x),
    }
    rows = _kept(rows, running, old)
    k = _heads(_conv(attn.k_conv, rows["k"]), attn.n_kv_heads)
    v = _heads(_conv(attn.v_conv, rows["v"]), attn.n_kv_heads)
    q = reference.rope_complex(q, where.index_BT, *where.rope)
    allowed = where.allowed(attn.n_heads, attn.n_local_heads, attn.local_window)
    out = reference.attention(q, k, v, allowed, attn.head_dim**-0.5)
    return _linear(attn.wo, out.flatten(2)), rows


def _mla(
    attn: MLAttention, x: Tensor, where: Positions, running: Tensor | None, old: dict[str, Tensor] | None
) -> tuple[Tensor, dict[str, Tensor]]:
    q = _heads(_linear(attn.q_up, _norm(attn.q_norm, _linear(attn.q_down, x))), attn.n_heads)
    down = _linear(attn.kv_down, x)
    k_rope = down[..., None, attn.latent_dim :]
    rows = {
        "c_kv": _norm(attn.kv_norm, down[..., : attn.latent_dim]),
        "k_rope": reference.rope_complex(k_rope, where.index_BT, *where.rope)[..., 0, :],
    }
    rows = _kept(rows, running, old)
    up = (attn.kv_up.weight * attn.kv_up.scale).view(attn.n_heads, attn.nope_dim + attn.v_dim, attn.latent_dim)
    out = reference.mla_expanded(
        q[..., : attn.nope_dim],
        reference.rope_complex(q[..., attn.nope_dim :], where.index_BT, *where.rope),
        _conv(attn.conv, rows["c_kv"]),
        rows["k_rope"],
        up[:, : attn.nope_dim],
        up[:, attn.nope_dim :],
        where.allowed(attn.n_heads, attn.n_local_heads, attn.local_window),
        (attn.nope_dim + attn.rope_dim) ** -0.5,
    )
    return _linear(attn.wo, out.flatten(2)), rows


def _kept(new: dict[str, Tensor], running: Tensor | None, old: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """``new`` rows (B, T, C) where positions run, ``old`` ones elsewhere, zeros where there never were any."""
    if running is None:
        return new
    return {name: torch.where(running[..., None], rows, old[name] if old else 0.0) for name, rows in new.items()}


def _moe(ffn: MoEFFN, x: Tensor) -> Tensor:
    tokens = x.flatten(0, 1)
    logits = _linear(ffn.router, tokens)
    chosen = (logits + ffn.router_bias).topk(ffn.topk, dim=-1).indices
    scores = logits.gather(1, chosen).sigmoid()
    weights = scores / scores.sum(-1, keepdim=True) if ffn.topk > 1 else scores
    if ffn.is_softmax:
        weights = logits.softmax(-1).gather(1, chosen)
        weights = weights / weights.sum(-1, keepdim=True)
    gate_up, down = ffn.gate_up * ffn.gate_up_scale, ffn.down * ffn.down_scale
    out = reference.moe_loop(tokens, gate_up, down, chosen, weights)
    if ffn.shared is not None:
        out = out + _expert(ffn.shared, tokens)
    return out.view(x.shape)


def _expert(ffn: Expert, x: Tensor) -> Tensor:
    return _linear(ffn.down, F.silu(_linear(ffn.gate, x)) * _linear(ffn.up, x))


def _gate(act: ACTHalting, before: Tensor, h: Tensor) -> Tensor:
    change = torch.linalg.vector_norm(h - before, dim=-1) / torch.linalg.vector_norm(h, dim=-1)
    h = h / torch.sqrt((h * h).mean(-1, keepdim=True) + 1e-6)
    seen = _linear(act.hidden, h) + torch.log(change[..., None] + 1e-3) * act.motion / act.std
    found = F.silu(seen) / math.sqrt(act.halt.in_features)
    return torch.sigmoid(((found * act.halt.weight[0]).sum(-1) + act.halt.bias) / act.std)


def _lora(lora: LoRAAdapter, x: Tensor, loop: int) -> Tensor:
    """Deeper loops than were ever trained use the scale of the deepest that was; in training, none is too deep."""
    n_scales = len(lora.scale.weight)
    trained = n_scales if lora.training else int(lora.trained_loops)
    row = max(0, min(loop, trained - 1, n_scales - 1))
    return (_linear(lora.down, x) * lora.scale.weight[row]) @ lora.B.T


def _loop_code(loop: int, n_channels: int, dim: int) -> Tensor:
    angles = [loop * 10000.0 ** (-2 * i / n_channels) for i in range((n_channels + 1) // 2)]
    code = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return torch.tensor(code[:n_channels] + [0.0] * (dim - n_channels))


def _conv(conv: ShortConv | None, x: Tensor) -> Tensor:
    if conv is None:
        return x
    channel_to_tap = torch.arange(x.shape[-1]) // conv.share
    return reference.causal_conv(x, conv.taps[:, channel_to_tap] / conv.std)


def _heads(x: Tensor, n_heads: int) -> Tensor:
    return x.view(*x.shape[:-1], n_heads, x.shape[-1] // n_heads)


def _linear(linear: Linear, x: Tensor) -> Tensor:
    return x @ (linear.scale * linear.weight.T)


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    return norm.weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + norm.eps)
