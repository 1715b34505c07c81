"""The baselines are what their names say, and load from what they save."""

import pytest
import torch
from helpers import tiny_config

from open_mythos import OpenMythos
from open_mythos.training.baselines import UnrolledMythos, build
from open_mythos.training.config import LoopConfig, TrainConfig

IDS = torch.arange(1, 9).unsqueeze(0)


def config(kind):
    return TrainConfig(model=tiny_config(lora_rank=0), loops=LoopConfig(maximum=3), kind=kind)


def n_parameters(model, part=".block."):
    return sum(p.numel() for name, p in model.named_parameters() if part in name)


def test_single_has_the_looped_models_parameters_and_one_loop():
    looped, single = build(config("looped")), build(config("single"))
    assert [p.shape for p in looped.parameters()] == [p.shape for p in single.parameters()]
    assert single.cfg.max_loop_iters == 1 and looped.cfg.max_loop_iters == 4


def test_unrolled_has_a_block_of_its_own_for_every_loop():
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


def test_unrolled_cannot_go_deeper():
    with pytest.raises(ValueError, match=r"n_loops=4.*3 blocks"):
        build(config("unrolled"))(IDS, n_loops=4)


def test_they_train_at_their_depth_alone_and_have_no_gate():
    for kind in ("looped", "single", "unrolled"):
        model = build(config(kind)).train()
        model(IDS.expand(9, -1)).square().mean().backward()
        assert not model.cfg.halting and not model.cfg.warm_start
        assert all(p.grad is None for name, p in model.named_parameters() if ".act." in name)


@pytest.mark.parametrize("kind", ["looped", "single", "unrolled"])
def test_saved_and_loaded(kind, tmp_path):
    torch.manual_seed(0)
    model = build(config(kind)).eval()
    model.save_pretrained(tmp_path)
    assert type(model) is (UnrolledMythos if kind == "unrolled" else OpenMythos)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(again(IDS), model(IDS))
