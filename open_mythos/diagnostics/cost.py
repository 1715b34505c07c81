"""Costs of a model of a given config: parameters, FLOPs and cache.

Counts are taken from a model on the meta device, so that it may be far too large for this machine.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

from open_mythos.cache import KVCache
from open_mythos.checkpoint import without_storage
from open_mythos.config import MythosConfig
from open_mythos.dict_cache import PADDING_SLOT
from open_mythos.model import OpenMythos
from open_mythos.nn.feed_forward import MoEFFN

FLOPS_PER_MULTIPLY_ADD = 2


@dataclass(frozen=True)
class Parameters:
    """Parameter counts; embedding and head are one matrix and are counted once.

    Attributes:
        total: all of them.
        active: those that one token uses: of the routed experts only ``n_experts_per_tok``.
    """

    total: int
    active: int


def parameters(cfg: MythosConfig) -> Parameters:
    """Count the parameters of a model. Loops share theirs, so the number of loops does not matter."""
    model = _without_storage(cfg)
    total = sum(p.numel() for p in model.parameters())
    return Parameters(total, total - int(_routed(model, cfg.n_experts - cfg.n_experts_per_tok)))


def flops_per_token(cfg: MythosConfig, n_loops: float, context: int) -> float:
    """Floating-point operations to decode one token that attends to ``context`` tokens, itself included.

    Counts the matrix products, two operations per multiply-add: every matrix as often as the token uses it, and the
    scores and values of attention. Norms, rotations, softmax and the short convolutions are left out. MLA is counted
    in its absorbed form, which decoding uses. A token of a long prompt costs less: on average it attends to half of
    the prompt, and MLA reads that in its expanded form.

    The gate is counted once per loop if ``cfg.halting``, else not at all. ``n_loops`` is a mean over tokens where they
    halt at different loops; ``context`` is at least 1.
    """
    return FLOPS_PER_MULTIPLY_ADD * _forward(cfg, n_loops, context, min(cfg.local_window, context), absorbed=True)


def flops_per_prompt_token(cfg: MythosConfig, n_loops: float, n_tokens: int) -> float:
    """As :func:`flops_per_token`, for a token of a prompt that is read in one pass: the mean over its ``n_tokens``.

    Token i attends to i tokens, and MLA is counted in its expanded form.
    """
    return FLOPS_PER_MULTIPLY_ADD * _forward(cfg, n_loops, *_mean_context(cfg, n_tokens), absorbed=False)


def flops_of_prompt(cfg: MythosConfig, n_loops: float, n_tokens: int) -> float:
    """As :func:`flops_per_prompt_token`, for all ``n_tokens`` together, as generation reads them.

    Only the last position needs logits, so the others skip the head and, in the coda's last block, all but what they
    write to the cache; MLA is counted in its absorbed form there, as the last position reads it.
    """
    model = _without_storage(cfg)
    missed: list[nn.Module] = [model.head]
    saved = 0.0
    if cfg.coda_layers:
        last = model.coda[-1]
        parts = ["attn.wo", "ffn", *(["attn.kv_up"] if cfg.attn_type == "mla" else [])]
        missed += [last.get_submodule(part) for part in parts]
        pairs = n_tokens * (n_tokens + 1) / 2 * _per_key(cfg, absorbed=False) - n_tokens * _per_key(cfg, absorbed=True)
        saved = cfg.n_heads * pairs
    saved += (n_tokens - 1) * _matrices(*missed)
    return n_tokens * flops_per_prompt_token(cfg, n_loops, n_tokens) - FLOPS_PER_MULTIPLY_ADD * saved


def flops_per_trained_token(
    cfg: MythosConfig, n_loops: float, n_tokens: int, n_grad: float | None = None, recompute: bool = False
) -> float:
    """As :func:`flops_per_prompt_token`, for a training step with gradient through ``n_grad`` of the loops (None: all).

    The backward pass counts twice the forward pass, and ``recompute`` adds a forward pass of the loops with gradient.
    The halting gate, which training does not run, is left out, and so is the cost of exploration for the gate and of
    warm starts.
    """
    idle = cfg.halting and cfg.recurrence == "injected"  # a mixture asks its gate in training too
    gate = _matrices(_without_storage(cfg).recurrent.act) if idle else 0
    outside, one = (_forward(cfg, n, *_mean_context(cfg, n_tokens), absorbed=False) for n in (0, 1))
    loop, n_grad = one - outside - gate, n_loops if n_grad is None else n_grad
    return FLOPS_PER_MULTIPLY_ADD * (3 * outside + (n_loops + (2 + recompute) * n_grad) * loop)


def bytes_per_decoding_step(
    cfg: MythosConfig, n_loops: int, context: int, batch: int = 1, bytes_per_number: int = 4
) -> float:
    """Bytes that must be read to decode one token for each of ``batch`` rows: weights of matrices, and cached keys.

    A weight counts each time it is used, so those of the recurrent block ``n_loops`` times: a block that stays in the
    processor's own cache is read from memory less often than that. Of the experts, the number expected if rows choose
    at random is counted; of the cached rows, those that a head attends to.

    ``context`` is the number of tokens attended to, the token itself included; ``bytes_per_number`` is that of weights
    and cache: 2 for bfloat16, 4 for float32.
    """
    met = cfg.n_experts and cfg.n_experts * (1 - (1 - cfg.n_experts_per_tok / cfg.n_experts) ** batch)
    outside, loop = _weights(cfg, met)
    rows_outside = (cfg.prelude_layers + cfg.coda_layers) * context * _row(cfg)
    window, n_local = min(cfg.local_window, context), cfg.n_local_heads
    if cfg.attn_type == "gqa":  # groups of heads share keys and values, the local heads first
        per_group = cfg.n_heads // cfg.n_kv_heads
        near = n_local // per_group  # groups in which all heads are local
        rows_loop = ((cfg.n_kv_heads - near) * context + near * window) * 2 * cfg.head_dim
    else:
        rows_loop = (window if n_local == cfg.n_heads else context) * _row(cfg)
    rows_loop *= cfg.core_layers
    return bytes_per_number * (outside + n_loops * loop + batch * (rows_outside + n_loops * rows_loop))


def _without_storage(cfg: MythosConfig) -> OpenMythos:
    return _built(cfg.to_json())


@lru_cache(maxsize=2)  # tables use one config many times, and the cost of a run uses two
def _built(config: str) -> OpenMythos:
    return without_storage(OpenMythos, MythosConfig.from_json(config))


def _matrices(*modules: nn.Module) -> int:
    """Number of weights of the linear layers inside: the multiply-adds of a token that passes each once."""
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, nn.Linear)]
    return sum(layer.weight.numel() for layer in layers)


def _routed(model: OpenMythos, n_experts: float) -> float:
    """Number of weights of ``n_experts`` routed experts in each layer of the recurrent block."""
    ffns = [layer.ffn for layer in model.recurrent.layers if isinstance(layer.ffn, MoEFFN)]
    return n_experts * sum(ffn.gate_up[0].numel() + ffn.down[0].numel() for ffn in ffns)


def _weights(cfg: MythosConfig, n_experts: float) -> tuple[int, float]:
    """Number of weights of matrices outside the loop, and inside it with ``n_experts`` of the routed experts."""
    model = _without_storage(cfg)
    outside, loop = _matrices(model.head, *model.prelude, *model.coda), float(_matrices(model.recurrent))
    loop += _routed(model, n_experts)
    lora, is_injected = model.recurrent.lora, cfg.recurrence == "injected"
    if lora is not None:
        loop += lora.B.numel()
        if is_injected:  # its input is the same in all loops, so it is computed once
            outside, loop = outside + _matrices(lora.down), loop - _matrices(lora.down)
    if not cfg.halting and is_injected:  # the gate is not computed
        loop -= _matrices(model.recurrent.act)
    return outside, loop


def _forward(cfg: MythosConfig, n_loops: float, seen: float, seen_near: float, absorbed: bool) -> float:
    """Multiply-adds of one token that attends to ``seen`` tokens, and to ``seen_near`` in a local head."""
    outside, loop = _weights(cfg, cfg.n_experts_per_tok)
    per_key = _per_key(cfg, absorbed)
    n_local = cfg.n_local_heads
    far = cfg.n_heads * seen * per_key
    near = ((cfg.n_heads - n_local) * seen + n_local * seen_near) * per_key
    return outside + (cfg.prelude_layers + cfg.coda_layers) * far + n_loops * (loop + cfg.core_layers * near)


def _per_key(cfg: MythosConfig, absorbed: bool) -> int:
    """Multiply-adds of one head for one key and its value."""
    if cfg.attn_type == "gqa":
        return 2 * cfg.head_dim
    if absorbed:
        return 2 * cfg.kv_lora_rank + cfg.qk_rope_head_dim
    return cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim


def _mean_context(cfg: MythosConfig, n_tokens: int) -> tuple[float, float]:
    """Tokens that a token of a prompt attends to on average, in a global and in a local head."""
    window = min(cfg.local_window, n_tokens)
    near = (window * (window + 1) / 2 + (n_tokens - window) * window) / n_tokens
    return (n_tokens + 1) / 2, near


def _row(cfg: MythosConfig) -> int:
    """Count of numbers that a cache holds for one token in one slot."""
    if cfg.attn_type == "gqa":
        return 2 * cfg.n_kv_heads * cfg.head_dim
    return cfg.kv_lora_rank + cfg.qk_rope_head_dim


def cache_bytes_per_token(cfg: MythosConfig, n_loops: int, bytes_per_number: int = 2) -> int:
    """Bytes that the key/value cache holds for each token; ``bytes_per_number`` is 2 for bfloat16, 4 for float32.

    In each of ``n_loops`` loops, every layer of the recurrent block has a slot of its own.
    """
    slots = cfg.prelude_layers + n_loops * cfg.core_layers + cfg.coda_layers
    return slots * _row(cfg) * bytes_per_number


def cache_bytes(kv_cache: KVCache | dict[str, Any]) -> int:
    """Measured bytes of the key and value rows that a cache holds.

    Not counted are the padding mask, the capacity that :class:`KVCache` reserves for further rows, and the few rows
    that the convolution still needs.
    """
    if isinstance(kv_cache, KVCache):
        return kv_cache.nbytes
    return sum(held["rows"].nbytes for slot, held in kv_cache.items() if slot != PADDING_SLOT)
