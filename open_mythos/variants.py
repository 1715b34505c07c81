"""Named configurations: small ones for a laptop, and the reference's seven from 1B to 1T parameters."""

import difflib
from dataclasses import replace

from open_mythos.config import MythosConfig


def mythos_nano() -> MythosConfig:
    """About 0.1M parameters, byte vocabulary: trains on a laptop CPU in minutes."""
    return MythosConfig(
        vocab_size=256, dim=64, n_heads=4, n_kv_heads=2, max_seq_len=512, max_loop_iters=8,
        prelude_layers=1, coda_layers=1, attn_type="gqa",
        n_experts=4, n_shared_experts=1, n_experts_per_tok=2, expert_dim=32, lora_rank=4,
    )  # fmt: skip


def mythos_800k() -> MythosConfig:
    """0.8M parameters, bytes: the looped model that was measured beside a dense one of the same quality."""
    return MythosConfig(
        vocab_size=257, dim=128, n_heads=4, n_kv_heads=2, max_seq_len=1024, max_loop_iters=8, prelude_layers=1,
        coda_layers=1, attn_type="gqa", rope_theta=1e4, n_experts=8, n_shared_experts=1, n_experts_per_tok=2,
        expert_dim=128, lora_rank=4, halting=False, warm_start=False,
    )  # fmt: skip


def dense_beside(cfg: MythosConfig) -> MythosConfig | None:
    """The dense transformer that was measured beside :func:`mythos_800k`; None for a model of any other shape.

    The context length and number of loops of ``cfg`` do not matter. The dense model has six blocks: its recurrent block
    is one more layer, run once, with an ordinary feed-forward and no local heads.
    """
    looped = mythos_800k()
    if replace(cfg, max_seq_len=looped.max_seq_len, max_loop_iters=looped.max_loop_iters, halting=False) != looped:
        return None
    return replace(
        looped, dim=192, n_heads=6, n_kv_heads=3, max_loop_iters=1, prelude_layers=3, coda_layers=2, local_window=0,
        n_experts=1, n_shared_experts=0, n_experts_per_tok=1, expert_dim=256, lora_rank=0,
    )  # fmt: skip


# Held-out bits per byte of these two by number of loops, mean of three seeds; benchmarks/dense.py measures them.
LOOPED_BITS, DENSE_BITS = {1: 2.142, 2: 2.111, 4: 2.112, 8: 2.114}, {1: 2.116}


def mythos_micro() -> MythosConfig:
    """About 4M parameters, byte vocabulary, MLA: a text model for a CPU or any GPU."""
    return MythosConfig(
        vocab_size=256, dim=256, n_heads=8, n_kv_heads=2, max_seq_len=1024, max_loop_iters=8,
        prelude_layers=1, coda_layers=1, attn_type="mla",
        kv_lora_rank=64, q_lora_rank=128, qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=32,
        n_experts=16, n_shared_experts=1, n_experts_per_tok=2, expert_dim=192, lora_rank=8,
    )  # fmt: skip


def mythos_100m() -> MythosConfig:
    """About 0.1B parameters, 32k vocabulary: one consumer GPU."""
    return MythosConfig(
        vocab_size=32000, dim=768, n_heads=12, n_kv_heads=4, max_seq_len=2048, max_loop_iters=8,
        prelude_layers=2, coda_layers=2, attn_type="mla",
        kv_lora_rank=128, q_lora_rank=384, qk_rope_head_dim=32, qk_nope_head_dim=64, v_head_dim=64,
        n_experts=32, n_shared_experts=1, n_experts_per_tok=4, expert_dim=768, lora_rank=8,
    )  # fmt: skip


def mythos_1b() -> MythosConfig:
    """1B parameters: 64 experts, 16 loops, 4k context."""
    return MythosConfig(
        vocab_size=32000, dim=2048, n_heads=16, n_kv_heads=4, max_seq_len=4096, max_loop_iters=16,
        prelude_layers=2, coda_layers=2, attn_type="mla",
        kv_lora_rank=256, q_lora_rank=512, qk_rope_head_dim=32, qk_nope_head_dim=64, v_head_dim=64,
        n_experts=64, n_shared_experts=2, n_experts_per_tok=4, expert_dim=2048, lora_rank=8,
    )  # fmt: skip


def mythos_3b() -> MythosConfig:
    """3B parameters: 64 experts, 16 loops, 4k context."""
    return MythosConfig(
        vocab_size=32000, dim=3072, n_heads=24, n_kv_heads=6, max_seq_len=4096, max_loop_iters=16,
        prelude_layers=2, coda_layers=2, attn_type="mla",
        kv_lora_rank=384, q_lora_rank=768, qk_rope_head_dim=32, qk_nope_head_dim=96, v_head_dim=96,
        n_experts=64, n_shared_experts=2, n_experts_per_tok=4, expert_dim=4096, lora_rank=8,
    )  # fmt: skip


def mythos_10b() -> MythosConfig:
    """10B parameters: 128 experts, 24 loops, 8k context."""
    return MythosConfig(
        vocab_size=32000, dim=4096, n_heads=32, n_kv_heads=8, max_seq_len=8192, max_loop_iters=24,
        prelude_layers=2, coda_layers=2, attn_type="mla",
        kv_lora_rank=512, q_lora_rank=1024, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
        n_experts=128, n_shared_experts=2, n_experts_per_tok=4, expert_dim=5632, lora_rank=16,
    )  # fmt: skip


def mythos_50b() -> MythosConfig:
    """50B parameters: 256 experts, 32 loops, 8k context."""
    return MythosConfig(
        vocab_size=32000, dim=6144, n_heads=48, n_kv_heads=8, max_seq_len=8192, max_loop_iters=32,
        prelude_layers=3, coda_layers=3, attn_type="mla",
        kv_lora_rank=512, q_lora_rank=1536, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
        n_experts=256, n_shared_experts=4, n_experts_per_tok=4, expert_dim=9728, lora_rank=32,
    )  # fmt: skip


def mythos_100b() -> MythosConfig:
    """100B parameters: 256 experts, 32 loops, 1M context."""
    return MythosConfig(
        vocab_size=32000, dim=8192, n_heads=64, n_kv_heads=8, max_seq_len=1_000_000, max_loop_iters=32,
        prelude_layers=4, coda_layers=4, attn_type="mla",
        kv_lora_rank=512, q_lora_rank=2048, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
        n_experts=256, n_shared_experts=4, n_experts_per_tok=8, expert_dim=13568, lora_rank=64,
        rope_theta=1e6, max_output_tokens=131072,
    )  # fmt: skip


def mythos_500b() -> MythosConfig:
    """500B parameters: 512 experts, 48 loops, 1M context."""
    return MythosConfig(
        vocab_size=100000, dim=12288, n_heads=96, n_kv_heads=16, max_seq_len=1_000_000, max_loop_iters=48,
        prelude_layers=4, coda_layers=4, attn_type="mla",
        kv_lora_rank=1024, q_lora_rank=3072, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
        n_experts=512, n_shared_experts=8, n_experts_per_tok=8, expert_dim=23040, lora_rank=128,
        rope_theta=1e6, max_output_tokens=131072,
    )  # fmt: skip


def mythos_1t() -> MythosConfig:
    """1T parameters: 512 experts, 64 loops, 1M context."""
    return MythosConfig(
        vocab_size=100000, dim=16384, n_heads=128, n_kv_heads=16, max_seq_len=1_000_000, max_loop_iters=64,
        prelude_layers=6, coda_layers=6, attn_type="mla",
        kv_lora_rank=1024, q_lora_rank=4096, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
        n_experts=512, n_shared_experts=8, n_experts_per_tok=8, expert_dim=34560, lora_rank=256,
        rope_theta=2e6, max_output_tokens=131072,
    )  # fmt: skip


VARIANTS = {
    maker.__name__: maker
    for maker in (
        mythos_nano, mythos_800k, mythos_micro, mythos_100m, mythos_1b, mythos_3b,
        mythos_10b, mythos_50b, mythos_100b, mythos_500b, mythos_1t,
    )
}  # fmt: skip


def variant(name: str) -> MythosConfig:
    """The config of a named variant; ``"1b"`` and ``"mythos_1b"`` both work.

    Raises:
        ValueError: for an unknown name, suggesting the nearest.
    """
    key = name.lower().replace("-", "_")
    key = key if key.startswith("mythos_") else f"mythos_{key}"
    if key not in VARIANTS:
        near = difflib.get_close_matches(key, VARIANTS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown variant {name!r}; did you mean {near!r}? The variants are {', '.join(VARIANTS)}")
    return VARIANTS[key]()
