"""The sheet of a plan, compared with real models, torch's own count of memory, and arithmetic by hand."""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import replace
from typing import Any

import pytest
from helpers import tiny_config
from simulate import peak

from open_mythos import VARIANTS, MythosConfig, OpenMythos
from open_mythos.checkpoint import without_storage
from open_mythos.diagnostics import flops_per_trained_token, parameters
from open_mythos.planning.job import Job, Layout, Settings
from open_mythos.planning.rank import pieces, tensor_degrees, units
from open_mythos.planning.sheet import Sheet

SHAPE: dict[str, Any] = dict(
    vocab_size=512, dim=512, n_heads=8, n_kv_heads=2, max_seq_len=512, max_loop_iters=16, prelude_layers=1,
    coda_layers=1, n_experts=16, n_shared_experts=1, n_experts_per_tok=2, expert_dim=512, lora_rank=8, halting=False,
    warm_start=False, kv_lora_rank=128, q_lora_rank=192, qk_rope_head_dim=32, qk_nope_head_dim=64, v_head_dim=64,
)  # fmt: skip
CHECKED = [("gqa", 16, 3, False), ("mla", 0, 3, True)]
if os.environ.get("PLAN_CHECK") == "all":
    CHECKED = list(itertools.product(("gqa", "mla"), (16, 0), (4, 16), (False, True)))


def sheet(cfg: MythosConfig, gpus: int, layout: Layout, **settings: Any) -> Sheet:
    return Sheet(Job(cfg, gpus, Settings(**settings)), layout)


@pytest.mark.parametrize(("attn_type", "n_experts", "loops", "recompute"), CHECKED)
def test_memory_matches_torchs_memory_tracker(attn_type: str, n_experts: int, loops: int, recompute: bool) -> None:
    cfg = MythosConfig(**SHAPE | {"attn_type": attn_type, "n_experts": n_experts})
    found = peak(cfg, world=8, rows=4, length=512, loops=loops, recompute=recompute)
    layout = Layout(shard=8, rows=4, recompute=recompute)
    said = sheet(cfg, 8, layout, length=512, loops=loops, ema=False, batch_size=32).memory.total
    assert said == pytest.approx(found, rel=0.1)


def test_fsdp_units_are_blocks_and_hold_all_parameters() -> None:
    cfg = tiny_config(core_layers=2, n_experts=4)
    config, total = cfg.to_json(), parameters(cfg).total
    found = units(config)
    assert sum(unit.numel for unit in found) == total
    blocks = ["prelude.0", "recurrent.block.0", "recurrent.block.1", "coda.0"]
    assert {unit.name for unit in found} == {"root", *blocks}
    assert not any(unit.is_routed for unit in found)
    apart = units(config, 1, 2, 2)
    routed = [unit for unit in apart if unit.is_routed]
    ffns = ["recurrent.block.0.ffn", "recurrent.block.1.ffn"]
    assert [unit.name for unit in routed] == ffns
    model = without_storage(OpenMythos, cfg)
    ffn: Any = model.recurrent.layers[0].ffn
    assert routed[0].numel == routed[0].n_routed == (ffn.gate_up.numel() + ffn.down.numel()) // 2
    others = {"root", *(f"{name}.{part}" for name in ffns for part in ("router", "shared"))}
    assert {unit.name for unit in apart} == {*ffns, *others}
    assert {unit.name for unit in units(config, 1, 2)} == {"root", *ffns}
    assert sum(unit.numel for unit in apart) == total - sum(unit.numel for unit in routed)
    core = sum(p.numel() for p in model.recurrent.block.parameters())
    assert sum(unit.n_core for unit in found) == core == sum(u.n_core + u.n_routed for u in apart)


def test_tensor_parallelism_divides_feed_forwards() -> None:
    cfg = tiny_config(dense_dim=18, expert_dim=12, n_experts_per_tok=2, n_shared_experts=1)
    assert tensor_degrees(cfg) == [1, 2, 3, 6]
    assert tensor_degrees(replace(cfg, prelude_layers=0, coda_layers=0)) == [1, 2, 3, 4, 6, 8, 12, 24]
    whole, thirds = units(cfg.to_json()), units(cfg.to_json(), 3)
    saved = {a.name: a.numel - b.numel for a, b in zip(whole, thirds, strict=True)}
    dense, shared = 3 * cfg.dim * 18 * 2 // 3, 3 * cfg.dim * 24 * 2 // 3
    assert saved == {"root": 0, "prelude.0": dense, "recurrent.block": shared, "coda.0": dense}


@pytest.mark.parametrize("tied", [True, False])
def test_tensor_parallelism_divides_the_vocabulary_if_divisible(tied: bool) -> None:
    cfg = tiny_config(dense_dim=18, expert_dim=12, n_shared_experts=1, vocab_size=24, tied_head=tied)
    whole, thirds = (units(cfg.to_json(), tensor)[0] for tensor in (1, 3))
    assert whole.name == "root" and whole.numel - thirds.numel == (2 - tied) * 24 * cfg.dim * 2 // 3
    settings: dict[str, Any] = dict(length=8, batch_size=2, precision="fp32")
    calls = {one.of: (one.count, one.bytes) for one in sheet(cfg, 3, Layout(tensor=3, rows=2), **settings).collectives}
    states = 2 * 8 * cfg.dim * 4
    assert calls["embeddings"] == calls["gradients of states"] == (1, states)
    assert calls["statistics"] == (3, 2 * 2 * 8 * 4)


def test_activations_at_tensor_degree_3_are_extrapolated_exactly() -> None:
    cfg = MythosConfig(**SHAPE | {"expert_dim": 384, "dense_dim": 768})
    from open_mythos.planning.rank import measured

    for name in ("block", "loop"):
        exact, said = (getattr(made(cfg.to_json(), 3, 256, False), name).kept for made in (measured, pieces))
        assert said == pytest.approx(exact, rel=1e-6)


def test_recomputation_saves_activations_for_one_more_forward_pass() -> None:
    cfg = MythosConfig(**SHAPE)
    kept, again = (sheet(cfg, 8, Layout(shard=8, recompute=r), length=256, batch_size=8) for r in (False, True))
    deep = sheet(cfg, 8, Layout(shard=8, recompute=True), length=256, batch_size=8, loops=64)
    assert again.memory.total < kept.memory.total and again.memory.activations < kept.memory.activations / 3
    assert deep.memory.activations - again.memory.activations == pytest.approx(48 * 256 * cfg.dim * 4)
    assert again.flops / kept.flops == pytest.approx(4 / 3, rel=0.1)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("loops", [4, 16])
def test_units_are_gathered_and_reduced_once_for_any_number_of_loops(loops: int, recompute: bool) -> None:
    cfg = tiny_config("gqa")
    layout = Layout(replicate=2, shard=4, accumulate=3, recompute=recompute)
    found = sheet(cfg, 8, layout, loops=loops, length=8, batch_size=24, precision="fp32").collectives
    total, n_units = parameters(cfg).total, len(units(cfg.to_json()))
    for kind, share in (("all_gather", 1), ("reduce_scatter", 1), ("all_reduce", 4)):
        ours = [one for one in found if one.kind == kind]
        assert len(ours) == n_units and {one.count for one in ours} == {1 if kind == "all_gather" else 3}
        assert sum(one.bytes for one in ours) == 4 * total / share
    assert len(found) == 3 * n_units


def exchanges(cfg: MythosConfig, layout: Layout) -> tuple[dict[str, int], dict[str, float]]:
    """Calls of each all-to-all and bytes of one call, for 24 tokens in five loops, three of them with gradient."""
    settings: dict[str, Any] = dict(loops=5, grad_loops=3, length=8, batch_size=3 * layout.replicate, precision="fp32")
    found = [one for one in sheet(cfg, layout.gpus, layout, **settings).collectives if one.kind == "all_to_all"]
    return {one.of: one.count for one in found}, {one.of: one.bytes for one in found}


def test_experts_exchange_tokens_twice_per_loop_in_each_direction() -> None:
    cfg = tiny_config("gqa", n_experts=4, n_experts_per_tok=2)
    layout = Layout(replicate=2, expert=2, rows=3)
    places = 2 - 2 / 6  # one of six pairs of experts is on this rank alone, one on the other
    row, result = 24 * 4 * (cfg.dim + 2 * 2), 24 * 4 * cfg.dim
    calls, bytes_of_one = exchanges(cfg, layout)
    assert calls == {"tokens": 5, "their gradients": 3, "results": 5 + 3}
    expected = {"tokens": 2 * row, "their gradients": places * row, "results": places * result}
    assert bytes_of_one == pytest.approx(expected)
    again, _ = exchanges(cfg, replace(layout, recompute=True))
    assert again == {"tokens": 8, "their gradients": 3, "results": 11}


def test_with_many_ranks_token_counts_are_exchanged_before_the_tokens() -> None:
    cfg = tiny_config("gqa", n_experts=8, n_experts_per_tok=1)
    calls, bytes_of_one = exchanges(cfg, Layout(replicate=4, expert=4, rows=3))
    assert calls["counts"] == 5 and bytes_of_one["counts"] == 4 * 16
    assert bytes_of_one["tokens"] == pytest.approx(24 * 4 * (cfg.dim + 2))


def test_unsharded_gradients_are_summed_in_one_call_per_group() -> None:
    cfg = tiny_config("gqa")
    found = sheet(cfg, 4, Layout(replicate=4, expert=2), length=8, batch_size=4).collectives
    routed = sum(unit.numel for unit in units(cfg.to_json(), 1, 2) if unit.is_routed)
    sums = {one.group: one.bytes for one in found if one.kind == "all_reduce"}
    assert sums == {"replicate": 4 * (parameters(cfg).total - 2 * routed), "copies": 4 * routed}


def test_flops_match_the_cost_functions() -> None:
    cfg = MythosConfig(**SHAPE)
    one = sheet(cfg, 4, Layout(replicate=4, rows=2), length=64, batch_size=8, loops=5, grad_loops=2)
    assert one.flops * 4 == pytest.approx(flops_per_trained_token(cfg, 5, 64, 2) * 8 * 64)
    halves = sheet(cfg, 4, Layout(replicate=2, tensor=2, rows=4), length=64, batch_size=8, loops=5, grad_loops=2)
    divided = 6 * cfg.dim * (cfg.shared_dim * (5 + 2 * 2) + (cfg.ffn_dim // 2 * 2) * 3 * 2 * (cfg.ffn_dim % 2 == 0))
    divided += 6 * cfg.dim * cfg.vocab_size  # the head, tied or not
    assert halves.flops * 2 == pytest.approx(one.flops * 4 - divided / 2 * 8 * 64)


def test_step_time_follows_the_bottleneck() -> None:
    cfg = VARIANTS["mythos_1b"]()
    slow = Sheet(Job(cfg, 16, Settings(batch_size=16, length=512), interconnect="0.1"), Layout(shard=16))
    fast = Sheet(Job(cfg, 16, Settings(batch_size=16, length=512), interconnect="nvlink"), Layout(shard=16))
    assert slow.bound == "interconnect" and slow.step_seconds > 10 * fast.step_seconds
    gather = next(one for one in slow.collectives if one.kind == "all_gather" and one.of == "recurrent.block")
    assert slow.seconds(gather) == pytest.approx(15 / 16 * gather.bytes / 0.1e9, rel=0.01)
    halved = Sheet(Job(cfg, 16, Settings(batch_size=16, length=512, tflops=10)), Layout(shard=16))
    assert halved.bound == "compute" and halved.times["compute"] == pytest.approx(halved.flops / 5e12)
    assert math.isclose(fast.tokens_per_second, 16 * 512 / fast.step_seconds)
