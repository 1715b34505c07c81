"""Predicted costs compared with real models."""

import pytest
import torch
from helpers import ATTENTION, tiny_config, tiny_model, tokens
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

import open_mythos.nn.attention as attention
import open_mythos.ops.attention as ops
import open_mythos.ops.experts as experts
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
def test_parameter_counts_match_a_real_model(attn_type, changes):
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
def test_cache_bytes_match_real_caches(attn_type, n_loops, dtype):
    model, ids = tiny_model(attn_type, halting=False).to(dtype), tokens(2, 7)
    plain, cache = {}, KVCache()
    mask = torch.ones(2, 7)
    mask[0, 0] = 0
    with torch.no_grad():
        model(ids, n_loops, kv_cache=plain, attention_mask=mask)
        model(ids, n_loops, kv_cache=cache)
    expected = ids.numel() * cache_bytes_per_token(model.cfg, n_loops, dtype.itemsize)
    assert cache_bytes(plain) == cache_bytes(cache) == expected
    assert cache_bytes({}) == cache_bytes(KVCache()) == 0


def _counted(work, cfg, monkeypatch):
    """FLOPs of ``work()``: of its matrix products, as PyTorch counts them, and of attention over unmasked positions.

    What attention kernels compute beyond these, at masked positions or to fill a block, is not counted.
    """
    attended, plain = 0, ops.attend

    def attend(q, kv, mask, scale, n_local=0, window=0):
        nonlocal attended
        (B, T, H, D), S = q.shape, kv.shape[1]
        query, key = torch.arange(S - T, S).unsqueeze(1), torch.arange(S)
        near, far = ((key <= query) & (key > query - reach) for reach in (window, S))
        width = D + (kv.shape[-1] - D or cfg.kv_lora_rank)  # of a key and its value, which may overlap
        attended += FLOPS_PER_MULTIPLY_ADD * B * width * int(n_local * near.sum() + (H - n_local) * far.sum())
        with _disable_current_modes():
            return plain(q, kv, mask, scale, n_local, window)

    monkeypatch.setattr(attention, "attend", attend)
    monkeypatch.setattr(experts, "MAX_GATHERED", 0)  # otherwise mixing two experts' outputs is a product too
    products = {
        torch.ops.open_mythos_ops_experts.grouped_mm: lambda x, weight, *_, **__: 2 * x[0] * x[1] * weight[2],
        torch.ops.open_mythos_ops_experts.grouped_outer: lambda x, y, *_, **__: 2 * x[0] * x[1] * y[1],
    }
    with FlopCounterMode(display=False, custom_mapping=products) as counter:
        work()
    return counter.get_total_flops(), attended


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("n_loops, halting", [(1, False), (3, False), (3, True)])
def test_flops_match_those_counted_by_pytorch(attn_type, changes, n_loops, halting, monkeypatch):
    model = tiny_model(attn_type, halting=halting, gate_bias=-20.0, **changes)  # the gate is computed but halts nothing
    ids, cache = tokens(1, 21), KVCache()
    with torch.no_grad():
        model(ids[:, :-1], n_loops, kv_cache=cache)
        found = _counted(lambda: model(ids[:, -1:], n_loops, kv_cache=cache), model.cfg, monkeypatch)
    assert flops_per_token(model.cfg, n_loops, context=21) == sum(found)


def test_flops_grow_linearly_with_loops_and_context():
    cfg = tiny_config("mla")
    by_loops = [flops_per_token(cfg, n, 10) for n in (1, 2, 3)]
    assert by_loops[2] - by_loops[1] == by_loops[1] - by_loops[0] > 0
    by_context = [flops_per_token(cfg, 2, n) for n in (10, 11, 12)]
    assert by_context[2] - by_context[1] == by_context[1] - by_context[0] > 0


@pytest.mark.parametrize("n_tokens", [1, 3, 9])
def test_flops_per_prompt_token_are_the_mean_over_the_prompt(n_tokens):
    cfg = tiny_config("gqa")
    alone = [flops_per_token(cfg, 2, context) for context in range(1, n_tokens + 1)]
    assert flops_per_prompt_token(cfg, 2, n_tokens) == pytest.approx(sum(alone) / n_tokens)


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("coda_layers", [0, 2])
def test_prompt_flops_count_the_end_of_the_coda_for_the_last_position_only(attn_type, coda_layers, monkeypatch):
    n_tokens, wide = 8, dict(kv_lora_rank=20)  # narrower latents are absorbed
    model = tiny_model(attn_type, halting=False, coda_layers=coda_layers, **wide)
    with torch.no_grad():
        last, whole = (
            sum(_counted(lambda n=n: model.head(model.hidden(tokens(1, n_tokens), 2, last=n)), model.cfg, monkeypatch))
            for n in (1, None)
        )
    missed = n_tokens * flops_per_prompt_token(model.cfg, 2, n_tokens) - flops_of_prompt(model.cfg, 2, n_tokens)
    assert whole - last == missed


def test_mla_prompt_flops_are_those_of_the_expanded_form():
    cfg = tiny_config("mla", local_window=0)
    per_pair = cfg.n_heads * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim)
    layers = cfg.prelude_layers + 2 + cfg.coda_layers
    grown = flops_per_prompt_token(cfg, 2, 3) - flops_per_prompt_token(cfg, 2, 1)  # one token more, on average
    assert grown == FLOPS_PER_MULTIPLY_ADD * layers * per_pair


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_training_flops_match_those_counted_by_pytorch(attn_type, monkeypatch):
    monkeypatch.setattr("open_mythos.ops.attention.EXACT_QUERIES", 0)  # products of the math kernel are counted
    model = tiny_model(attn_type, halting=False, local_window=0).train()
    products, attended = _counted(lambda: model(tokens(5, 1), 3).square().sum().backward(), model.cfg, monkeypatch)
    assert 5 * flops_per_trained_token(model.cfg, 3, 1) == products + 3 * attended  # its backward is not counted


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_bytes_per_decoding_step_are_weights_and_cache_rows(attn_type):
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


def test_larger_batches_share_weights_and_read_more_experts():
    cfg = tiny_config()
    one, two, many = (bytes_per_decoding_step(cfg, 2, 0, batch) for batch in (1, 2, 1000))
    expert = 4 * 2 * 3 * cfg.dim * cfg.expert_dim  # bytes, loops, matrices
    assert two - one == pytest.approx(expert)  # the second row's two experts of four: one is new, on average
    assert many - one == pytest.approx(2 * expert)
