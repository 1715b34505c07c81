"""A plain, slow implementation of the whole model on a model's parameters, for tests; differentiable in each of them.

Every position is computed at every loop; ``torch.where`` then restores what halting or padding must not change.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.model import OpenMythos
from open_mythos.nn.attention import GQAttention, MLAttention, ShortConv
from open_mythos.nn.block import TransformerBlock
from open_mythos.nn.feed_forward import Expert, MoEFFN
from open_mythos.nn.halting import ACTHalting
from open_mythos.nn.injection import Bridge, LoRAAdapter
from open_mythos.nn.linear import Linear, RMSNorm
from open_mythos.ops import reference


def reference_logits(
    model: OpenMythos, input_ids: Tensor, n_loops: int | None = None, attention_mask: Tensor | None = None
) -> Tensor:
    """What ``model(input_ids, n_loops, attention_mask=attention_mask)`` should return.

    Follows ``model.training``: in training no position halts, in eval mode they do if ``cfg.halting`` is set. A
    halted position keeps its state, and its keys and values as they were after the last loop that it ran.

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
    if attention_mask is not None and attention_mask.max() > 1:  # each document alone
        rows = []
        for ids, numbers in zip(input_ids, attention_mask, strict=True):
            lengths = numbers.unique_consecutive(return_counts=True)[1].tolist()
            rows.append(torch.cat([reference_logits(model, part[None], n_loops)[0] for part in ids.split(lengths)]))
        return torch.stack(rows)
    real_BT = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    where = Positions(real_BT, (real_BT.cumsum(1) - 1).clamp(min=0), cfg.rope[1:], cfg.causal)

    x = model.embed.weight[input_ids] * math.sqrt(cfg.dim)
    x = torch.where(real_BT[..., None], x, 0.0)
    for block in model.prelude:
        x, _ = _block(block, x, where)
    e = _norm(model.input_norm, x)
    loops = _mixture if cfg.recurrence == "mixture" else _loops
    first = e if cfg.state_init == "input" else torch.zeros_like(e)
    h = loops(model, first, e, where, cfg.max_loop_iters if n_loops is None else n_loops)
    for block in model.coda:
        h, _ = _block(block, h, where)
    return _norm(model.norm, h) @ model.head.weight.T


@dataclass
class Positions:
    """What attention needs: which tokens are real (B, T), their positions (B, T), ``cfg.rope[1:]``, ``cfg.causal``."""

    real_BT: Tensor
    index_BT: Tensor
    rope: tuple[float, float, int]
    causal: bool

    def allowed(self, n_heads: int, n_local_heads: int, window: int) -> Tensor:
        """(B, H, T, T) bool: a query sees itself, and real keys: earlier ones if causal, nearer ones in local heads."""
        T = self.real_BT.shape[1]
        query, key = torch.arange(T)[:, None], torch.arange(T)[None, :]
        causal = key <= query if self.causal else torch.ones(T, T, dtype=torch.bool)
        local = causal & (key > query - window) & (key < query + window)
        by_head_HTS = torch.stack([local if head < n_local_heads else causal for head in range(n_heads)])
        return (by_head_HTS[None] & self.real_BT[:, None, None, :]) | (key == query)


def _loops(model: OpenMythos, h: Tensor, e: Tensor, where: Positions, n_loops: int) -> Tensor:
    cfg, recurrent = model.cfg, model.recurrent
    running = where.real_BT
    mass = torch.zeros(running.shape)
    rows: list[Rows | None] = [None for _ in recurrent.layers]
    for loop in range(n_loops):
        u = recurrent.injection.get_A() * h + recurrent.injection.B * e + _bridge(recurrent.bridge, h - e)
        u = torch.where(where.real_BT[..., None], u + _loop_code(loop, cfg.loop_index_dim, cfg.dim), u)
        for layer, block in enumerate(recurrent.layers):
            u, rows[layer] = _block(block, u, where, running, rows[layer])
        u = _norm(recurrent.norm, u + _lora(recurrent.lora, e, loop))
        before, h = h, torch.where(running[..., None], u, h)
        if cfg.halting and not model.training:
            mass = mass + torch.where(running, _gate(recurrent.act, before, h).detach(), 0.0)
            running = running & (mass < cfg.act_threshold)
    return h


def _mixture(model: OpenMythos, h: Tensor, e: Tensor, where: Positions, n_loops: int) -> Tensor:
    cfg, recurrent = model.cfg, model.recurrent
    mixed, spent = torch.zeros_like(e), torch.zeros(e.shape[:2])
    running = where.real_BT
    rows: Rows | None = None
    for loop in range(n_loops):
        x = torch.where(where.real_BT[..., None], h + e + _loop_code(loop, cfg.loop_index_dim, cfg.dim), h + e)
        x, rows = _block(recurrent.block, _norm(recurrent.norm, x), where, running, rows)
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


@dataclass
class Rows:
    """Keys and values of all positions, (B, T, C) each, before the convolution and after it."""

    raw: dict[str, Tensor]
    final: dict[str, Tensor]


def _block(
    block: nn.Module, x: Tensor, where: Positions, running: Tensor | None = None, rows: Rows | None = None
) -> tuple[Tensor, Rows]:
    """The block's output (B, T, dim), and the key/value rows that it read.

    ``rows`` are those of the loop before, kept where ``running`` (B, T) is False.
    """
    assert isinstance(block, TransformerBlock)
    read = _gqa if isinstance(block.attn, GQAttention) else _mla
    attended, rows = read(block.attn, _norm(block.attn_norm, x), where, running, rows)  # type: ignore[arg-type]
    x = x + attended
    feed_forward = _moe if isinstance(block.ffn, MoEFFN) else _expert
    return x + feed_forward(block.ffn, _norm(block.ffn_norm, x)), rows  # type: ignore[arg-type]


def _gqa(attn: GQAttention, x: Tensor, where: Positions, *loop: Any) -> tuple[Tensor, Rows]:
    q = _linear(attn.wq, x).unflatten(-1, (attn.n_heads, -1))
    k = _linear(attn.wk, x).unflatten(-1, (attn.n_kv_heads, -1))
    raw = {"k": reference.rope_complex(k, where.index_BT, *where.rope).flatten(2), "v": _linear(attn.wv, x)}
    rows = _convolved(raw, {"k": attn.k_conv, "v": attn.v_conv}, where, *loop)
    k, v = (x.unflatten(-1, (attn.n_kv_heads, -1)) for x in rows.final.values())
    q = reference.rope_complex(q, where.index_BT, *where.rope)
    allowed = where.allowed(attn.n_heads, attn.n_local_heads, attn.local_window)
    out = reference.attention(q, k, v, allowed, attn.head_dim**-0.5)
    return _linear(attn.wo, out.flatten(2)), rows


def _mla(attn: MLAttention, x: Tensor, where: Positions, *loop: Any) -> tuple[Tensor, Rows]:
    q = _linear(attn.q_up, _norm(attn.q_norm, _linear(attn.q_down, x))).unflatten(-1, (attn.n_heads, -1))
    down = _linear(attn.kv_down, x)
    k_rope = down[..., None, attn.latent_dim :]
    raw = {
        "c_kv": _norm(attn.kv_norm, down[..., : attn.latent_dim]),
        "k_rope": reference.rope_complex(k_rope, where.index_BT, *where.rope)[..., 0, :],
    }
    rows = _convolved(raw, {"c_kv": attn.conv, "k_rope": None}, where, *loop)
    up = (attn.kv_up.weight * attn.kv_up.scale).view(attn.n_heads, attn.nope_dim + attn.v_dim, attn.latent_dim)
    out = reference.mla_expanded(
        q[..., : attn.nope_dim],
        reference.rope_complex(q[..., attn.nope_dim :], where.index_BT, *where.rope),
        rows.final["c_kv"],
        rows.final["k_rope"],
        up[:, : attn.nope_dim],
        up[:, attn.nope_dim :],
        where.allowed(attn.n_heads, attn.n_local_heads, attn.local_window),
        (attn.nope_dim + attn.rope_dim) ** -0.5,
    )
    return _linear(attn.wo, out.flatten(2)), rows


def _convolved(
    raw: dict[str, Tensor], convs: dict[str, Any], where: Positions, running: Tensor | None, old: Rows | None
) -> Rows:
    """New rows where positions run, the previous loop's elsewhere; zeros if there were none, and at padding."""
    raw = {name: torch.where(where.real_BT[..., None], rows, 0.0) for name, rows in raw.items()}
    raw = _kept(raw, running, None if old is None else old.raw)
    final = {name: _conv(convs[name], rows, where.causal) for name, rows in raw.items()}
    return Rows(raw, _kept(final, running, None if old is None else old.final))


def _kept(new: dict[str, Tensor], running: Tensor | None, old: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """``new`` rows (B, T, C) where positions run; elsewhere ``old`` ones, or zeros if there are none."""
    if running is None:
        return new
    return {name: torch.where(running[..., None], rows, old[name] if old else 0.0) for name, rows in new.items()}


def _moe(ffn: MoEFFN, x: Tensor) -> Tensor:
    tokens = x.flatten(0, 1)
    logits = _linear(ffn.router, tokens)
    chosen = (logits + ffn.router_bias).topk(ffn.topk, dim=-1).indices
    scores = (logits.softmax(-1) if ffn.is_softmax else logits.sigmoid()).gather(1, chosen)
    weights = scores / scores.sum(-1, keepdim=True) if ffn.topk > 1 or ffn.is_softmax else scores
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


def _lora(lora: LoRAAdapter | None, x: Tensor, loop: int) -> Tensor:
    """Deeper loops than were ever trained use the scale of the deepest that was."""
    if lora is None:
        return torch.zeros_like(x)
    row = max(0, min(loop, int(lora.trained_loops) - 1, len(lora.scale.weight) - 1))
    return (_linear(lora.down, x) * lora.scale.weight[row]) @ lora.B.T


def _bridge(bridge: Bridge | None, changed: Tensor) -> Tensor:
    return torch.zeros_like(changed) if bridge is None else _expert(bridge.ffn, _norm(bridge.norm, changed))


def _loop_code(loop: int, n_channels: int, dim: int) -> Tensor:
    """(dim,): sines and cosines of the loop in the first channels, zeros behind them."""
    angles = [loop * 10000.0 ** (-2 * i / n_channels) for i in range((n_channels + 1) // 2)]
    code = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return torch.tensor(code[:n_channels] + [0.0] * (dim - n_channels))


def _conv(conv: ShortConv | None, x: Tensor, causal: bool) -> Tensor:
    """Over the last positions if causal, else centred."""
    if conv is None:
        return x
    channel_to_tap, n_taps = torch.arange(x.shape[-1]) // conv.share, len(conv.taps)
    ahead = 0 if causal else (n_taps - 1) // 2
    x = F.pad(x, (0, 0, 0, ahead))
    return reference.causal_conv(x, conv.taps[:, channel_to_tap] / conv.std)[:, ahead:]


def _linear(linear: Linear, x: Tensor) -> Tensor:
    return x @ (linear.scale * linear.weight.T)


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    if not isinstance(norm, RMSNorm):  # nn.Identity
        return x
    return norm.weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + norm.eps)
