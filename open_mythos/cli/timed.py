"""The models that ``mythos bench`` times, and the price of their tokens."""

from collections.abc import Callable
from typing import Any

import torch

from open_mythos.cli.info import find_config
from open_mythos.config import MythosConfig
from open_mythos.diagnostics.speed import Speed, decode_speed, prefill_speed, train_speed
from open_mythos.fields import must
from open_mythos.model import OpenMythos
from open_mythos.models import load_model, model_dir
from open_mythos.training.allocator import keep_freed_memory
from open_mythos.variants import DENSE_BITS, LOOPED_BITS

_HEAD, _VOCABULARY = 64, 8192  # head width and vocabulary of models made by --dim


def build(model: str | None, dim: int | None, attn: str | None, experts: int | None, loops: int | None) -> OpenMythos:
    """The model to time, with every position running every loop.

    Raises:
        ValueError: if both a model and a shape are given, or one of them is invalid.
    """
    shape = {"--dim": dim, "--attn": attn, "--experts": experts}
    if model is None:
        made = OpenMythos(shaped(dim or 512, attn or "gqa", experts or 8, loops or 4))
    else:
        given = [option for option, value in shape.items() if value is not None]
        must(not given, f"{model} already has a shape; leave out {' and '.join(given)}, or leave out the model")
        try:
            model_dir(model)
        except ValueError:  # a variant, or a file's config: random weights
            made = OpenMythos(find_config(model))
        else:
            made = load_model(model)
    made.cfg.halting = False
    made.cfg.max_loop_iters = loops or made.cfg.max_loop_iters  # also the depth of the rows explored in training
    return made


def shaped(dim: int, attn: str, experts: int, loops: int) -> MythosConfig:
    """A model of width ``dim``, other sizes in proportion: heads of 64, experts of width dim, two for each token."""
    heads = dim // _HEAD
    must(dim % _HEAD == 0, f"--dim {dim} is not a multiple of {_HEAD}, the head size; use {heads * _HEAD}")
    return MythosConfig(
        vocab_size=_VOCABULARY, dim=dim, n_heads=heads, n_kv_heads=heads // 2 if heads % 2 == 0 else heads,
        max_loop_iters=loops, prelude_layers=1, coda_layers=1, attn_type=attn,
        kv_lora_rank=dim // 4, q_lora_rank=dim // 2, qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=_HEAD,
        n_experts=experts, n_shared_experts=1, n_experts_per_tok=min(2, experts), expert_dim=dim,
    )  # fmt: skip


def time_works(
    model: OpenMythos, n_loops: int, sizes: dict[Any, tuple[int, int]], dtype: torch.dtype, seconds: float,
    begin: Callable[[str], None],
) -> list[Speed]:  # fmt: skip
    """Time each work of ``sizes`` (by name: rows and tokens) at ``n_loops``, also the maximum depth in training."""
    model.cfg.max_loop_iters = n_loops
    model.cfg.max_seq_len = max(model.cfg.max_seq_len, *(length + 64 for _, length in sizes.values()))
    found = []
    for work, size in sizes.items():
        begin(f"{work}, {n_loops} loops")
        if work == "train":
            keep_freed_memory()  # as the Trainer does
            found.append(train_speed(model.float(), *size, n_loops, dtype, seconds))
        else:
            speed = prefill_speed if work == "prefill" else decode_speed
            found.append(speed(model.to(dtype), *size, n_loops, seconds))
    return found


def prices(per_hour: float, looped: list[list[Speed]], dense: list[Speed]) -> list[dict[str, Any]]:
    """The price of a million tokens of each work: for the model at every depth, and for the dense one, if any.

    Quality is known only if there is a dense one: held-out bits per byte, None at depths that were not measured.
    """
    rows = []
    for name, speeds, bits in [*(("looped", one, LOOPED_BITS) for one in looped), ("dense", dense, DENSE_BITS)]:
        for first in speeds[:1]:
            rows.append({
                "model": name, "n_loops": first.n_loops, "bits_per_byte": bits.get(first.n_loops) if dense else None,
                "tokens_per_second": {one.work: one.tokens_per_second for one in speeds},
                "per_million_tokens": {one.work: per_hour / 3600 / one.tokens_per_second * 1e6 for one in speeds},
            })  # fmt: skip
    return rows
