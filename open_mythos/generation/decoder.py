"""The model's arithmetic for a few new tokens at a time, with weights made ready beforehand.

At one token a step, time goes not by multiplications but by operations. So everything that depends on the weights alone
is done once for a whole text: factors, norms and projections of one input become one matrix. What is computed is what
the modules compute, up to rounding; they are the reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.cache import Cache, coda_slot, core_slot, loop_slot, prelude_slot, stand_in
from open_mythos.nn.block import CoreBlocks, TransformerBlock
from open_mythos.nn.conv import ShortConv
from open_mythos.nn.exits import Exit
from open_mythos.nn.feed_forward import Expert
from open_mythos.nn.gqa import GQAttention
from open_mythos.nn.injection import LTIInjection
from open_mythos.nn.linear import Linear
from open_mythos.nn.mla import MLAttention
from open_mythos.nn.moe import MoEFFN
from open_mythos.nn.norm import RMSNorm
from open_mythos.nn.recurrent import RecurrentBlock
from open_mythos.ops.experts import grouped_swiglu
from open_mythos.ops.loop_index import loop_index_embedding
from open_mythos.ops.mask import CausalMask
from open_mythos.ops.norm import rms_norm
from open_mythos.ops.product import rows_product
from open_mythos.ops.rope import apply_rope, rope_table

if TYPE_CHECKING:
    from open_mythos.model import OpenMythos


@dataclass(frozen=True)
class Tokens:
    """What all blocks need to know of the tokens at hand.

    Attributes:
        shape: (B, T).
        freqs: rotary (cos, sin) of the T positions, (T, P/2, 2).
        mask: of these tokens.
        cache: holds the tokens before these; these are written behind them.
    """

    shape: tuple[int, int]
    freqs: Tensor
    mask: CausalMask
    cache: Cache

    @property
    def at(self) -> int:
        """Position of the first token."""
        return self.mask.n_keys - self.mask.n_new


def _ready(layer: Linear, norm: RMSNorm | None = None) -> Tensor:
    """The matrix (O, I) that a layer multiplies with, behind a norm without its weight."""
    weight = layer.weight.float() * layer.scale
    return (weight if norm is None else weight * norm.weight.float()).to(layer.weight.dtype)


class _GQA:
    """:class:`GQAttention`: (N, dim), normalised, to (N, H * D) for the output projection."""

    def __init__(self, attn: GQAttention, norm: RMSNorm) -> None:
        self.attn, self.head_dim = attn, attn.head_dim
        self.heads = [attn.n_heads + attn.n_kv_heads, attn.n_kv_heads]
        self.w_in = torch.cat([_ready(layer, norm) for layer in (attn.wq, attn.wk, attn.wv)])
        self.taps = None
        if attn.k_conv is not None and attn.v_conv is not None:
            shape = 1, -1, attn.n_kv_heads, attn.head_dim
            self.taps = attn.k_conv.kernel().view(shape), attn.v_conv.kernel().view(shape)

    def __call__(self, x_ND: Tensor, tokens: Tokens, slot: str) -> Tensor:
        qk, v = rows_product(x_ND, self.w_in).view(*tokens.shape, -1, self.head_dim).split(self.heads, 2)
        q, k = apply_rope(qk, tokens.freqs).split([self.attn.n_heads, self.attn.n_kv_heads], 2)
        rows = tokens.cache.slot(slot).update({"k": k, "v": v}, tokens.at)
        found = self.attn.attend(q, rows["k"], rows["v"], tokens.mask, taps=self.taps)
        return found.reshape(len(x_ND), -1)


class _MLA:
    """:class:`MLAttention`, absorbed: (N, dim), normalised, to (N, H * Dv) for the output projection."""

    def __init__(self, attn: MLAttention, norm: RMSNorm) -> None:
        self.attn = attn
        self.w_in = torch.cat([_ready(attn.q_down, norm), _ready(attn.kv_down, norm)])
        self.widths = [len(attn.q_down.weight), attn.latent_dim, attn.rope_dim]
        self.w_q = _ready(attn.q_up, attn.q_norm)
        up_k, up_v = attn.up_projections()
        self.up_k, self.up_v = up_k.contiguous(), up_v.transpose(1, 2).contiguous()  # (H, nope, R), (H, R, Dv)
        self.taps = None if attn.conv is None else attn.conv.kernel()

    def __call__(self, x_ND: Tensor, tokens: Tokens, slot: str) -> Tensor:
        attn, (B, T) = self.attn, tokens.shape
        q, c_kv, k_rope = rows_product(x_ND, self.w_in).split(self.widths, 1)
        c_kv = attn.kv_norm(c_kv)
        q = rows_product(_normed(q, attn.q_norm.eps), self.w_q).view(B * T, attn.n_heads, -1)
        turned = torch.cat([q[..., attn.nope_dim :], k_rope.unsqueeze(1)], 1).view(B, T, -1, attn.rope_dim)
        q_rope, k_rope = apply_rope(turned, tokens.freqs).split([attn.n_heads, 1], 2)
        new = {"c_kv": c_kv.view(B, T, -1), "k_rope": k_rope.squeeze(2)}
        rows = tokens.cache.slot(slot).update(new, tokens.at)
        q_latent = torch.bmm(q[..., : attn.nope_dim].transpose(0, 1), self.up_k).transpose(0, 1)
        found = attn.read_latents(q_latent.view(B, T, attn.n_heads, -1), q_rope, rows, tokens.mask, self.taps)
        return torch.bmm(found.reshape(B * T, attn.n_heads, -1).transpose(0, 1), self.up_v).transpose(0, 1).flatten(1)


class _Block:
    """:class:`TransformerBlock` on (N, dim)."""

    def __init__(self, block: nn.Module) -> None:
        assert isinstance(block, TransformerBlock)
        attn, ffn = block.attn, block.ffn
        assert isinstance(attn, GQAttention | MLAttention)
        self.attn = _GQA(attn, block.attn_norm) if isinstance(attn, GQAttention) else _MLA(attn, block.attn_norm)
        self.w_attn = _ready(attn.wo)
        self.eps, self.moe = block.attn_norm.eps, ffn if isinstance(ffn, MoEFFN) else None
        dense = ffn.shared if isinstance(ffn, MoEFFN) else ffn
        gate_up = [] if dense is None else [_ready(dense.gate, block.ffn_norm), _ready(dense.up, block.ffn_norm)]
        self.w_down = None if dense is None else _ready(dense.down)
        if isinstance(ffn, MoEFFN):
            gate_up.append(_ready(ffn.router, block.ffn_norm))
            self.expert_norm = block.ffn_norm.weight * ffn.gate_up_scale
        self.w_ffn = torch.cat(gate_up)
        self.widths = [len(weight) for weight in gate_up]

    def __call__(self, x_ND: Tensor, tokens: Tokens, slot: str) -> Tensor:
        x_ND = rows_product(self.attn(_normed(x_ND, self.eps), tokens, slot), self.w_attn, to_NO=x_ND)
        normed = _normed(x_ND, self.eps)
        parts = rows_product(normed, self.w_ffn).split(self.widths, 1)
        if self.w_down is not None:
            x_ND = rows_product(F.silu(parts[0]).mul_(parts[1]), self.w_down, to_NO=x_ND)
        if self.moe is not None:
            chosen, weights = self.moe.choose(parts[-1].float())
            x_ND = x_ND + grouped_swiglu(
                normed * self.expert_norm, self.moe.gate_up, self.moe.down, chosen, weights * self.moe.down_scale
            )
        return x_ND


def _normed(x_ND: Tensor, eps: float) -> Tensor:
    return rms_norm(x_ND, None, eps)


class ModuleDecoder:
    """Three stages by the model's own modules: for every model, padding, hooks and all. Rows may be padded on the left.

    Args:
        model: in eval mode, without halting.
    """

    def __init__(self, model: OpenMythos) -> None:
        self.model = model

    def encode(self, input_ids: Tensor, cache: Cache) -> tuple[Tensor, Tokens]:
        """The encoded input (B, T, dim) of tokens (B, T) behind those of the cache."""
        (B, T), (e, freqs, mask) = input_ids.shape, self.model.encode(input_ids, cache)
        return e, Tokens((B, T), freqs, mask, cache)

    def first_state(self, e: Tensor) -> Tensor:
        """(B, T, dim); see :meth:`OpenMythos.first_state`."""
        return self.model.first_state(e)

    def loops(self, h: Tensor, e: Tensor, tokens: Tokens, first: int, end: int) -> Tensor:
        """States (B, T, dim) after loops ``first`` to ``end - 1``."""
        return self.model.recurrent(h, e, tokens.freqs, tokens.mask, end, tokens.cache, first_loop=first)

    def logits(self, input_ids: Tensor, cache: Cache, n_loops: int) -> Tensor:
        """All three stages: (B, T) tokens to (B, T, vocab_size)."""
        e, tokens = self.encode(input_ids, cache)
        return self.decode(self.loops(self.first_state(e), e, tokens, 0, n_loops), tokens)

    def decode(self, h: Tensor, tokens: Tokens) -> Tensor:
        """Logits (B, T, vocab_size) of states (B, T, dim)."""
        return self.model.head(self.model.decode(h, tokens.freqs, tokens.mask, tokens.cache))


class Decoder(ModuleDecoder):
    """As :class:`ModuleDecoder`, in few operations. Rows must not be padded.

    Made of a model's weights as they are; make a new one when they change.

    Args:
        model: one that :func:`is_plain`, in eval mode.
        n_loops: the most loops that will be run.
    """

    @torch.no_grad()
    def __init__(self, model: OpenMythos, n_loops: int) -> None:
        super().__init__(model)
        recurrent, cfg = model.recurrent, model.cfg
        self.prelude, self.coda = ([_Block(block) for block in blocks] for blocks in (model.prelude, model.coda))
        self.core = [_Block(block) for block in recurrent.layers]
        self.A, zero = recurrent.injection.get_A(), torch.zeros_like(recurrent.injection.B)
        self.codes = [
            loop_index_embedding(zero, loop, cfg.loop_index_dim) if cfg.loop_index_dim else None
            for loop in range(n_loops)
        ]
        lora = recurrent.lora
        self.lora_up = None if lora is None else [(lora.B * lora.row(loop)).t() for loop in range(n_loops)]

    def encode(self, input_ids: Tensor, cache: Cache) -> tuple[Tensor, Tokens]:
        (B, T), cfg, past = input_ids.shape, self.model.cfg, cache.length
        freqs = rope_table(torch.arange(past, past + T, device=input_ids.device), *cfg.rope)
        tokens = Tokens((B, T), freqs, CausalMask(T, past + T), cache)
        x = F.embedding(input_ids.flatten(), self.model.embed.weight) * math.sqrt(cfg.dim)
        for layer, block in enumerate(self.prelude):
            x = block(x, tokens, prelude_slot(layer))
        return self.model.input_norm(x).view(B, T, -1), tokens

    def loops(self, h: Tensor, e: Tensor, tokens: Tokens, first: int, end: int) -> Tensor:
        for after in self._each(h, e, tokens, first, end):
            h = after
        return h

    def _each(self, h: Tensor, e: Tensor, tokens: Tokens, first: int, end: int) -> Iterator[Tensor]:
        """The states after each of these loops."""
        recurrent, shape = self.model.recurrent, h.shape
        h, e = h.flatten(0, 1), e.flatten(0, 1)
        injected = recurrent.injection.B * e
        adapted = None if recurrent.lora is None else recurrent.lora.down(e)
        for loop in range(first, end):
            code = self.codes[loop]
            u = torch.addcmul(injected if code is None else injected + code, self.A, h)
            slot = loop_slot(loop, tokens.cache)
            for layer, block in enumerate(self.core):
                u = block(u, tokens, core_slot(slot, layer))
            if adapted is not None and self.lora_up is not None:
                u = torch.addmm(u, adapted, self.lora_up[loop])
            h = recurrent.norm(u)
            yield h.view(shape)

    def loops_until(self, exit: Exit, h: Tensor, e: Tensor, tokens: Tokens, n_loops: int) -> Tensor:
        """The state (1, 1, dim) of one position at the loop where ``exit`` stops it, or after the last.

        The loops that it does not run find, when later tokens look, what it had at its last.
        """
        assert tokens.shape == (1, 1) and not exit.needs_predictions
        may_stop, ran = exit.follow(h, self.model.recurrent.act), 0
        for after in self._each(h, e, tokens, 0, n_loops):
            before, h, ran = h, after, ran + 1
            if may_stop(before, h):
                break
        stand_in(tokens.cache, ran - 1, n_loops, tokens.at, len(self.core))
        return h

    def decode(self, h: Tensor, tokens: Tokens) -> Tensor:
        h = h.flatten(0, 1)
        for layer, block in enumerate(self.coda):
            h = block(h, tokens, coda_slot(layer))
        return self.model.head(self.model.norm(h)).view(*tokens.shape, -1)


def make_decoder(model: OpenMythos, n_loops: int, padded: bool) -> ModuleDecoder:
    """The fastest decoder that serves.

    Args:
        model: in eval mode, without halting.
        n_loops: the most loops that will be run.
        padded: whether rows hold padding.
    """
    return Decoder(model, n_loops) if not padded and is_plain(model) else ModuleDecoder(model)


def is_plain(model: OpenMythos) -> bool:
    """Whether the model's blocks are this library's own modules, with plain weights and nobody watching.

    A hook would see nothing of a :class:`Decoder`, an adapter in place of a layer would not take part, and quantised
    weights would be taken apart; and autocast chooses dtypes for products that are written otherwise here.
    """
    if torch.is_autocast_enabled(model.embed.weight.device.type):
        return False
    if type(model.recurrent) is not RecurrentBlock or vars(model.recurrent).keys() & {"forward", "iterate", "step"}:
        return False
    parts = model.prelude, model.recurrent.block, model.recurrent.injection, model.coda
    return all(is_own(part, _OWN) for part in parts)


def is_own(part: nn.Module, own: tuple[type[nn.Module], ...]) -> bool:
    """Whether all of a module is of the classes ``own`` themselves, with plain weights, and nobody watching."""
    for module in part.modules():
        if type(module) not in own or module._forward_hooks or module._forward_pre_hooks:
            return False
        if any(type(weight) is not nn.Parameter for weight in module.parameters(recurse=False)):
            return False
        if "forward" in vars(module):
            return False
    return True


_OWN = (
    TransformerBlock, CoreBlocks, GQAttention, MLAttention, MoEFFN, Expert, Linear, RMSNorm, ShortConv, LTIInjection,
    nn.ModuleList, nn.Dropout,
)  # fmt: skip


def together(parts: Sequence[Tokens]) -> Tokens:
    """Tokens that were encoded one after another, as one sequence."""
    T = sum(part.shape[1] for part in parts)
    cache, first = parts[0].cache, parts[0].at
    freqs = torch.cat([part.freqs for part in parts], -3)
    return Tokens((parts[0].shape[0], T), freqs, CausalMask(T, first + T, cache.valid), cache)
