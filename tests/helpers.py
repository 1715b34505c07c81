"""Tiny models in which every component affects the output, and helpers that compare results."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from open_mythos import KVCache, MythosConfig, OpenMythos
from open_mythos.nn.feed_forward import MoEFFN

ATTENTION = ("gqa", "mla")
TINY: dict[str, Any] = dict(
    vocab_size=23,
    dim=32,
    n_heads=4,
    n_kv_heads=2,
    max_seq_len=32,
    max_loop_iters=4,
    prelude_layers=1,
    coda_layers=1,
    kv_lora_rank=12,
    q_lora_rank=20,
    qk_rope_head_dim=6,
    qk_nope_head_dim=10,
    v_head_dim=14,
    n_experts=4,
    n_shared_experts=1,
    n_experts_per_tok=2,
    expert_dim=12,
    act_threshold=0.9,
    rope_theta=10000.0,
    lora_rank=3,
    recurrence="injected",
    router_score="sigmoid",
    dropout=0.0,
    injection_decay=0.7,
    injection_gain=0.7,
    input_norm=True,
    state_norm=True,
    state_init="input",
    state_noise=0.0,
    conv_taps=3,
    local_window=4,
    local_share=0.75,
    loop_index_dim=0,
    causal=True,
    halting=True,
    warm_start=False,
    halting_tolerance=0.1,
    router_bias_rate=0.01,
    weight_std=0.02,
    core_layers=1,
    dense_dim=0,
    tied_head=True,
    norm_eps=1e-6,
)


def tiny_config(attn_type: str = "gqa", **changes: Any) -> MythosConfig:
    """A small config with every field that matters set, so that no test depends on a default."""
    return MythosConfig(attn_type=attn_type, **{**TINY, **changes})


def tiny_model(attn_type: str = "gqa", *, seed: int = 0, gate_bias: float = -1.0, **changes: Any) -> OpenMythos:
    """A model in eval mode, as if it were trained: norms, LoRA, router bias and gate have random values.

    With ``gate_bias`` -1 positions halt at different loops, most of them within four.
    """
    torch.manual_seed(seed)
    model = OpenMythos(tiny_config(attn_type, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(("injection.raw_A", "injection.B")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
        gate = model.recurrent.act
        std = getattr(gate, "std", 0.05)  # the gate of a mixture has no std, since it reads states of any scale
        gate.halt.weight.normal_(std=3.0 * std)  # the gate divides its output by std
        if model.cfg.recurrence == "injected":
            gate.motion.normal_(std=0.1 * std)
        gate.halt.bias.fill_(gate_bias * std)
        for layer in model.recurrent.layers:
            if isinstance(layer.ffn, MoEFFN):
                layer.ffn.router_bias.normal_(std=0.1)
        if model.recurrent.bridge is not None:
            model.recurrent.bridge.ffn.down.weight.normal_(std=0.02)
        if model.recurrent.lora is not None:
            model.recurrent.lora.B.normal_(std=0.1)
            model.recurrent.lora.scale.weight.normal_()
            model.recurrent.lora.trained_loops.fill_(3)
    return model.eval()


def tokens(*shape: int, seed: int = 0, high: int = 23) -> Tensor:
    """Random token ids."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def left_padding(lengths: list[int], width: int) -> Tensor:
    """(B, width) mask: each row's last ``length`` tokens are real."""
    return torch.arange(width) >= width - torch.tensor(lengths)[:, None]


def loops_used(model: OpenMythos, input_ids: Tensor, n_loops: int, **inputs: Any) -> Tensor:
    """(B, T) number of loops that updated each position."""
    with torch.no_grad():
        ran = [state.ran.long() for state, _ in model.iterate(input_ids, n_loops, **inputs)]
    return torch.stack(ran).sum(0)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 2e-5, what: str = "") -> None:
    """Assert that differences are at most ``tolerance``, times the largest expected value if that exceeds 1."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} for {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    if not actual.numel():
        return
    difference = (actual.double() - expected.double()).abs().max().item()
    limit = tolerance * max(1.0, expected.abs().max().item())
    assert difference <= limit, f"{what}: differs by {difference:.2e}, limit {limit:.2e}"


def gradients(model: OpenMythos, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of the loss for every parameter, zeros where there is none."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for name, parameter, gradient in zip(names, parameters, found, strict=True)
    }


def damaged(
    content: bytes, draw: random.Random, sizes: Sequence[int], also: Callable[[bytearray], bytes] | None = None
) -> bytes:
    """``content`` with one kind of damage, drawn at random: a flipped bit, truncation, zeros, swapped blocks of one of
    ``sizes``, inserted bytes, or ``also``."""
    new, n = bytearray(content), len(content)
    kind, at = draw.randrange(5 if also is None else 6), draw.randrange(n)
    if kind == 0:
        new[at] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del new[at:]
    elif kind == 2:
        new[at : at + 4096] = bytes(len(new[at : at + 4096]))
    elif kind == 3:
        size = draw.choice(sizes)
        one, two = (draw.randrange(max(1, n // size)) * size for _ in range(2))
        new[one : one + size], new[two : two + size] = new[two : two + size], new[one : one + size]
    elif kind == 4:
        new[at:at] = draw.randbytes(8)
    elif also is not None:
        return also(new)
    return bytes(new)


def chunkings(total: int) -> st.SearchStrategy[list[int]]:
    """Lists of chunk sizes that sum to ``total``."""

    def fitted(sizes: list[int]) -> list[int]:
        cut: list[int] = []
        for size in [*sizes, total]:
            cut.append(min(size, total - sum(cut)))
        return [size for size in cut if size]

    return st.lists(st.integers(1, total), min_size=1, max_size=total).map(fitted)


@torch.no_grad()
def in_chunks(
    model: OpenMythos, ids: Tensor, sizes: list[int], n_loops: int, cache: KVCache | dict, mask: Tensor | None = None
) -> Tensor:
    """Logits of all tokens, passed to the model in chunks of ``sizes``."""
    out, start = [], 0
    for size in sizes:
        span = slice(start, start + size)
        out.append(model(ids[:, span], n_loops, cache, attention_mask=None if mask is None else mask[:, span]))
        start += size
    return torch.cat(out, 1)
