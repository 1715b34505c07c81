"""Predicted cost against real models."""

import pytest
import torch
from helpers import ATTENTION, tiny_config, tiny_model, tokens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import open_mythos.nn.attention as attention
import open_mythos.ops.attention as ops
import open_mythos.ops.rows as expert_rows
from open_mythos import VARIANTS, KVCache
from open_mythos.diagnostics import (
    bytes_per_decoding_step,
    cache_bytes,
    cache_bytes_per_token,
    flops_of_prompt,
    flops_per_prompt_token,
    flops_per_token,
    flops_per_trained_token,
    parameters,
)
from open_mythos.diagnostics.cost import FLOPS_PER_MULTIPLY_ADD

CHANGES = [
    {},
    {"conv_taps": 0, "lora_rank": 0, "local_window": 0}, {"n_shared_experts": 0, "prelude_layers": 2},
           {"core_layers": 2}, {"core_layers": 2, "n_experts": 0, "dense_dim": 20, "tied_head": False}]  # fmt: skip


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("changes", CHANGES)
def test_parameters_of_a_real_model(attn_type, changes):
    model = tiny_model(attn_type, **changes)
    count, cfg = parameters(model.cfg), model.cfg
    assert count.total == sum(p.numel() for p in model.parameters())
    idle = cfg.core_layers * (cfg.n_experts - cfg.n_experts_per_tok) if cfg.n_experts else 0
    assert count.total - count.active == idle * 3 * cfg.dim * cfg.expert_dim


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_counted_without_allocating(name):
    count = parameters(VARIANTS[name]())
    assert 0 < count.active < count.total


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("n_loops", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_of_real_caches(attn_type, n_loops, dtype):
    model, ids = tiny_model(attn_type).to(dtype), tokens(2, 7)
    plain, cache = {}, KVCache()
    mask = torch.ones(2, 7)
    mask[0, 0] = 0
    with torch.no_grad():
        model(ids, n_loops, kv_cache=plain, attention_mask=mask)
        model(ids, n_loops, kv_cache=cache)
    expected = ids.numel() * cache_bytes_per_token(model.cfg, n_loops, dtype.itemsize)
    assert cache_bytes(plain) == cache_bytes(cache) == expected
    assert cache_bytes({}) == cache_bytes(KVCache()) == 0


def _grouped_mm_flops(x, weight, *args, **kwargs):
    return FLOPS_PER_MULTIPLY_ADD * x[0] * x[1] * weight[-1]


UNKNOWN_TO_THE_COUNTER = {
    torch.ops.aten._grouped_mm: _grouped_mm_flops,
    torch.ops.aten.mv: lambda matrix, *_, **__: FLOPS_PER_MULTIPLY_ADD * matrix[0] * matrix[1],
    torch.ops.aten.addmm_: lambda _, a, b, *__, **___: FLOPS_PER_MULTIPLY_ADD * a[0] * a[1] * b[1],
    torch.ops.aten.addmv_: lambda _, matrix, *__, **___: FLOPS_PER_MULTIPLY_ADD * matrix[0] * matrix[1],
}


def _counted(model, context, n_loops, monkeypatch):
    """FLOPs that PyTorch counts while the last of ``context`` tokens is decoded.

    Its counter knows neither the fused CPU attention, so the plain one is run, nor grouped products, nor those of local
    attention, which are written as sums.
    """
    local, plain = 0, ops.attend_local

    def attend_local(q, k, v, window, *rest):
        nonlocal local
        keys = min(window, k.shape[1])
        local += FLOPS_PER_MULTIPLY_ADD * q.shape[:3].numel() * keys * (q.shape[-1] + v.shape[-1])
        return plain(q, k, v, window, *rest)

    monkeypatch.setattr(attention, "attend_local", attend_local)
    monkeypatch.setattr(ops, "attend_local", attend_local)
    monkeypatch.setattr(attention, "_FEW", context + 1)  # or the convolutions, left out, would be part of the products
    ids, cache = tokens(1, context), KVCache()
    counter = FlopCounterMode(display=False, custom_mapping=UNKNOWN_TO_THE_COUNTER)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(ids[:, :-1], n_loops, kv_cache=cache)
        local = 0
        with counter:
            model(ids[:, -1:], n_loops, kv_cache=cache)
    return counter.get_total_flops() + local


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("n_loops, halting", [(1, False), (3, False), (3, True)])
def test_flops_are_those_that_pytorch_counts(attn_type, changes, n_loops, halting, monkeypatch):
    # expert_dim a multiple of 4: grouped products of other float32 widths are padded, and padding is not counted here.
    model = tiny_model(attn_type, halting=halting, gate_bias=-20.0, **changes)  # a gate that is asked halts nothing
    assert flops_per_token(model.cfg, n_loops, context=21) == _counted(model, 21, n_loops, monkeypatch)


def test_flops_grow_by_the_same_amount_with_every_loop_and_token():
    cfg = tiny_config("mla")
    by_loops = [flops_per_token(cfg, n, 10) for n in (1, 2, 3)]
    assert by_loops[2] - by_loops[1] == by_loops[1] - by_loops[0] > 0
    by_context = [flops_per_token(cfg, 2, n) for n in (10, 11, 12)]
    assert by_context[2] - by_context[1] == by_context[1] - by_context[0] > 0


@pytest.mark.parametrize("n_tokens", [1, 3, 9])
def test_a_token_of_a_prompt_costs_the_mean_over_the_prompt(n_tokens):
    cfg = tiny_config("gqa")
    alone = [flops_per_token(cfg, 2, context) for context in range(1, n_tokens + 1)]
    assert flops_per_prompt_token(cfg, 2, n_tokens) == pytest.approx(sum(alone) / n_tokens)


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("coda_layers", [0, 2])
def test_only_the_last_position_of_a_prompt_passes_the_end_of_the_coda(attn_type, coda_layers, monkeypatch):
    n_tokens, wide = 8, dict(v_head_dim=16, kv_lora_rank=20)  # narrower values are padded, narrower latents absorbed
    model = tiny_model(attn_type, halting=False, coda_layers=coda_layers, **wide)
    monkeypatch.setattr(expert_rows, "_best_width", lambda counts: 0)  # or rows that stand idle would be counted
    counted = []
    for last in (1, None):
        counter = FlopCounterMode(display=False, custom_mapping=UNKNOWN_TO_THE_COUNTER)
        with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH):
            model.head(model.hidden(tokens(1, n_tokens), 2, last=last))
        counted.append(counter.get_total_flops())
    missed = n_tokens * flops_per_prompt_token(model.cfg, 2, n_tokens) - flops_of_prompt(model.cfg, 2, n_tokens)
    cfg = model.cfg
    per_key = {"gqa": 2 * cfg.head_dim, "mla": cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim}[attn_type]
    behind_the_mask = n_tokens * (n_tokens - 1) // 2 if coda_layers else 0  # counted by PyTorch, and of no use
    hidden = FLOPS_PER_MULTIPLY_ADD * cfg.n_heads * per_key * behind_the_mask
    assert counted[1] - counted[0] == missed + hidden


def test_mla_reads_a_prompt_in_its_expanded_form():
    cfg = tiny_config("mla", local_window=0)
    per_pair = cfg.n_heads * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim)
    layers = cfg.prelude_layers + 2 + cfg.coda_layers
    grown = flops_per_prompt_token(cfg, 2, 3) - flops_per_prompt_token(cfg, 2, 1)  # one token more, on average
    assert grown == FLOPS_PER_MULTIPLY_ADD * layers * per_pair


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_a_step_of_training_costs_what_pytorch_counts(attn_type, monkeypatch):
    monkeypatch.setattr(expert_rows, "_best_width", lambda counts: 0)  # or rows that stand idle would be counted
    model = tiny_model(attn_type, halting=False, local_window=0).train()
    counter = FlopCounterMode(display=False, custom_mapping=UNKNOWN_TO_THE_COUNTER)
    with sdpa_kernel(SDPBackend.MATH), counter:
        model(tokens(5, 1), 3).square().sum().backward()
    assert 5 * flops_per_trained_token(model.cfg, 3, 1) == counter.get_total_flops()


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_bytes_of_a_decoding_step(attn_type):
    cfg = tiny_config(attn_type)
    weights = bytes_per_decoding_step(cfg, 3, 0)
    assert weights == 4 * flops_per_token(cfg, 3, 0) / FLOPS_PER_MULTIPLY_ADD  # one row uses each weight once
    whole = tiny_config(attn_type, local_window=0)
    rows = bytes_per_decoding_step(whole, 3, 20) - weights
    assert rows == 20 * cache_bytes_per_token(whole, 3, 4)
    assert bytes_per_decoding_step(whole, 3, 20, bytes_per_number=2) == (weights + rows) / 2
    near = {"gqa": 0.5, "mla": 0.0}[attn_type]  # 3 of 4 heads are local: 1 of 2 groups, and none of one latent
    unread = 3 * near * (20 - cfg.local_window) * cache_bytes_per_token(cfg, 0, 4) / 2
    assert bytes_per_decoding_step(cfg, 3, 20) == weights + rows - unread


def test_rows_share_weights_and_meet_more_experts():
    cfg = tiny_config()
    one, two, many = (bytes_per_decoding_step(cfg, 2, 0, batch) for batch in (1, 2, 1000))
    expert = 4 * 2 * 3 * cfg.dim * cfg.expert_dim  # bytes, loops, matrices
    assert two - one == pytest.approx(expert)  # the second row's two experts of four: one is new, on average
    assert many - one == pytest.approx(2 * expert)
