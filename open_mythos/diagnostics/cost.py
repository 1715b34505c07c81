"""What a model of a given config costs: parameters, arithmetic and cache. Nothing is allocated.

Counts are taken from a model without storage, so that one far too large for this machine can be planned on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from open_mythos.config import MythosConfig
from open_mythos.model import OpenMythos
from open_mythos.nn.linear import Linear
from open_mythos.nn.moe import MoEFFN

FLOPS_PER_MULTIPLY_ADD = 2


@dataclass(frozen=True)
class Parameters:
    """Parameter counts; embedding and head are one matrix and are counted once.

    Attributes:
        total: all of them.
        active: those that one token meets: of the routed experts only ``n_experts_per_tok``.
    """

    total: int
    active: int


def parameters(cfg: MythosConfig) -> Parameters:
    """Parameters of a model. Loops share theirs, so their number plays no part."""
    model = _without_storage(cfg)
    total = sum(p.numel() for p in model.parameters())
    ffn = model.recurrent.block.ffn
    return Parameters(total, total - _routed(ffn, cfg.n_experts - cfg.n_experts_per_tok))


def flops_per_token(cfg: MythosConfig, n_loops: float, context: int) -> float:
    """Floating-point operations to decode one token that sees ``context`` tokens, its own included.

    Counts the matrix products, two operations per multiply-add: every matrix that the token meets, once for each
    time, and the scores and values of attention. Norms, rotations, softmax and the short convolutions are left out.
    MLA is counted in its absorbed form, which decoding uses. A token of a long prompt costs less: on average it sees
    half of the prompt, and MLA reads that in its expanded form.

    Args:
        cfg: the model's config; the gate is asked after every loop if ``cfg.halting``, and else not counted.
        n_loops: loops that the token runs; a mean over tokens, where they halt at different ones.
        context: tokens that it sees, at least 1.
    """
    model = _without_storage(cfg)
    layers = [*model.prelude, *model.coda]
    outside = _matrices(model.head, *layers) + len(layers) * _attention(cfg, context, n_local=0)
    loop = _matrices(model.recurrent) + _routed(model.recurrent.block.ffn, cfg.n_experts_per_tok)
    if model.recurrent.lora is not None:
        loop += model.recurrent.lora.B.numel()
    if not cfg.halting:  # then nobody asks the gate
        loop -= _matrices(model.recurrent.act)
    loop += _attention(cfg, context, cfg.n_local_heads)
    return FLOPS_PER_MULTIPLY_ADD * (outside + n_loops * loop)


def _without_storage(cfg: MythosConfig) -> OpenMythos:
    return _built(cfg.to_json())


@lru_cache(maxsize=1)  # a table asks for one config many times
def _built(config: str) -> OpenMythos:
    with torch.device("meta"):
        return OpenMythos(MythosConfig.from_json(config))


def _matrices(*modules: nn.Module) -> int:
    """Weights of the linear layers inside: multiply-adds of one token that passes each once."""
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, Linear | nn.Linear)]
    return sum(layer.weight.numel() for layer in layers)


def _routed(ffn: nn.Module, n_experts: int) -> int:
    """Weights of so many of the routed experts."""
    assert isinstance(ffn, MoEFFN)
    return n_experts * (ffn.gate_up[0].numel() + ffn.down[0].numel())


def _attention(cfg: MythosConfig, context: int, n_local: int) -> int:
    """Multiply-adds of one token's scores and values in a layer, ``n_local`` of whose heads see a window only."""
    keys_read = (cfg.n_heads - n_local) * context + n_local * min(cfg.local_window, context)  # summed over heads
    per_key = 2 * cfg.head_dim if cfg.attn_type == "gqa" else 2 * cfg.kv_lora_rank + cfg.qk_rope_head_dim
    return keys_read * per_key


def cache_bytes_per_token(cfg: MythosConfig, n_loops: int, bytes_per_number: int = 2) -> int:
    """Bytes that the key/value cache holds for each token.

    Args:
        cfg: the model's config.
        n_loops: loops that are run; each has a slot of its own.
        bytes_per_number: 2 for bfloat16, 4 for float32.
    """
    slots = cfg.prelude_layers + n_loops + cfg.coda_layers
    gqa = 2 * cfg.n_kv_heads * cfg.head_dim
    mla = cfg.kv_lora_rank + cfg.qk_rope_head_dim
    return slots * (gqa if cfg.attn_type == "gqa" else mla) * bytes_per_number
