"""The baselines have the structure that their names promise, and load what they save."""

import pytest
import torch
from helpers import tiny_config

from open_mythos import OpenMythos
from open_mythos.diagnostics import flops_per_token
from open_mythos.model import PlainMythos, UnrolledMythos
from open_mythos.models import load_model
from open_mythos.training.baselines import build, counted, mean_context
from open_mythos.training.config import LoopConfig, TrainConfig
from open_mythos.training.plan import KINDS

IDS = torch.arange(1, 9).unsqueeze(0)


def config(kind):
    return TrainConfig(model=tiny_config(lora_rank=0), loops=LoopConfig(maximum=3), kind=kind)


def n_parameters(model, part=".block."):
    return sum(p.numel() for name, p in model.named_parameters() if part in name)


def test_single_has_the_looped_models_parameters_and_one_loop():
    looped, single = build(config("looped")), build(config("single"))
    assert [p.shape for p in looped.parameters()] == [p.shape for p in single.parameters()]
    assert single.cfg.max_loop_iters == 1 and looped.cfg.max_loop_iters == 4


def test_unrolled_has_a_separate_block_for_every_loop():
    looped, unrolled = build(config("looped")).eval(), build(config("unrolled")).eval()
    assert n_parameters(unrolled) == 3 * n_parameters(looped)
    tied = unrolled.recurrent.blocks
    for block in tied[1:]:
        block.load_state_dict(tied[0].state_dict())
    looped.load_state_dict(
        {**looped.state_dict(), **{k: v for k, v in unrolled.state_dict().items() if "recurrent" not in k}}
    )
    looped.recurrent.load_state_dict(tied[0].state_dict(), strict=False)
    torch.testing.assert_close(unrolled(IDS), looped(IDS, n_loops=3))


@pytest.mark.parametrize("change", [
    {}, {"core_layers": 2}, {"lora_rank": 3}, {"attn_type": "mla"}, {"n_experts": 0, "dense_dim": 40},
    {"tied_head": False},
], ids=str)  # fmt: skip
def test_wide_spends_the_flops_of_all_loops_in_one(change):
    cfg = TrainConfig(
        model=tiny_config(**{"lora_rank": 0, "halting": False, **change}), loops=LoopConfig(maximum=6), kind="wide"
    )
    wide, context = counted(cfg), mean_context(cfg, cfg.task.max_difficulty)
    one, six = flops_per_token(wide.cfg, 1, context), flops_per_token(cfg.model, 6, context)
    assert abs(one / six - 1) < 0.03 and wide.cfg.max_loop_iters == 1
    fed = [made.expert_dim / made.dim if made.n_experts else made.ffn_dim / made.dim for made in (wide.cfg, cfg.model)]
    assert 0.9 < fed[0] / fed[1] < 1.6, "dim grows as far as it can, and feed-forwards make up the rest"
    same = "n_heads", "n_kv_heads", "n_experts", "n_experts_per_tok", "core_layers", "prelude_layers", "coda_layers"
    assert all(getattr(wide.cfg, name) == getattr(cfg.model, name) for name in same)
    assert sum(p.numel() for p in wide.parameters()) > sum(p.numel() for p in OpenMythos(cfg.model).parameters())


def test_plain_is_a_pre_norm_stack_and_nothing_else():
    plain = build(config("plain")).eval()
    x = plain.embed(IDS) * plain.cfg.dim**0.5
    ctx = plain.encode(IDS)[1]
    for block in (*plain.prelude, *(block.block for block in plain.recurrent.blocks), *plain.coda):
        x = x + block.attn(block.attn_norm(x), ctx)
        x = x + block.ffn(block.ffn_norm(x))
    torch.testing.assert_close(plain(IDS), plain.head(plain.norm(x)))
    assert len(plain.recurrent.blocks) == 3 and not any("injection" in name for name, _ in plain.named_parameters())


@pytest.mark.parametrize("core_layers", [1, 2])
def test_plain_generates_the_same_tokens_with_and_without_a_cache(core_layers):
    torch.manual_seed(0)
    plain = build(TrainConfig(model=tiny_config(core_layers=core_layers), loops=LoopConfig(maximum=3), kind="plain"))
    ids = plain.eval().generate(IDS, 6, temperature=0)
    torch.testing.assert_close(plain(ids)[:, :-1].argmax(-1)[:, IDS.shape[1] - 1 :], ids[:, IDS.shape[1] :])


@pytest.mark.parametrize("loops, depth", [
    (LoopConfig(maximum=3), 3),
    (LoopConfig("fixed", mean=4, maximum=8), 4),
    (LoopConfig("poisson", mean=7.6, maximum=32), 8),
    (LoopConfig("lognormal", mean=9, maximum=6), 6),
    (LoopConfig("curriculum", mean=2, maximum=5), 5),
])  # fmt: skip
def test_baselines_are_as_deep_as_the_loops_in_training(loops, depth):
    for kind in ("unrolled", "plain"):
        cfg = TrainConfig(model=tiny_config(), loops=loops, kind=kind)
        assert cfg.depths == [depth] and counted(cfg).cfg.max_loop_iters == depth


def test_unrolled_refuses_more_loops_than_it_has_blocks():
    with pytest.raises(ValueError, match=r"n_loops=4.*3 blocks"):
        build(config("unrolled"))(IDS, n_loops=4)


def test_models_of_every_kind_train_without_gate_and_warm_start():
    for kind in KINDS:
        model = build(config(kind)).train()
        model(IDS.expand(9, -1)).square().mean().backward()
        assert not model.cfg.halting and not model.cfg.warm_start
        assert all(p.grad is None for name, p in model.named_parameters() if ".act." in name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_every_kind_is_saved_and_loads_again(kind, tmp_path):
    torch.manual_seed(0)
    model = build(config(kind)).eval()
    model.save_pretrained(tmp_path)
    assert type(model) is {"unrolled": UnrolledMythos, "plain": PlainMythos}.get(kind, OpenMythos)
    (tmp_path / "training.json").write_text(f'{{"kind": "{kind}"}}')
    again = load_model(tmp_path)
    assert type(again) is type(model)
    torch.testing.assert_close(again(IDS), model(IDS))
