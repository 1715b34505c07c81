"""Depth-wise LoRA: zero when new, a scale for each trained loop, and well defined at deeper loops."""

from itertools import pairwise

import pytest
import torch
from helpers import assert_near, tiny_config, tiny_model, tokens

from open_mythos import OpenMythos
from open_mythos.nn.injection import LoRAAdapter


def trained(max_loops: int, n_loops: int, rank: int = 3) -> LoRAAdapter:
    """An adapter with random weights, of which ``n_loops`` loops count as trained."""
    torch.manual_seed(0)
    lora = LoRAAdapter(8, rank, max_loops)
    lora.B.data.normal_()
    lora.scale.weight.data.normal_()
    lora.trained_loops.fill_(n_loops)
    return lora.eval()


def test_a_new_adapter_adds_nothing():
    lora = LoRAAdapter(8, 3, 4)
    for loop in (0, 3, 40):
        assert lora(torch.randn(2, 5, 8), loop).eq(0).all()


def test_the_adapter_follows_its_formula():
    lora, x = trained(6, 6), torch.randn(2, 5, 8)
    for loop in range(6):
        expected = (x @ lora.down.weight.T * lora.down.scale * lora.scale.weight[loop]) @ lora.B.T
        assert_near(lora(x, loop), expected)


@pytest.mark.parametrize("seen", [1, 3, 6, 9])
def test_loops_deeper_than_trained_use_the_deepest_trained_scale(seen):
    lora, x = trained(6, seen), torch.randn(2, 8)
    deepest = lora(x, min(seen, 6) - 1)
    for loop in range(min(seen, 6), 12):
        assert_near(lora(x, loop), deepest, 0.0)
    outputs = [lora(x, loop) for loop in range(min(seen, 6))]
    assert all(not torch.equal(a, b) for a, b in pairwise(outputs))


@pytest.mark.parametrize("setting", ["eval", "no_grad", "auxiliary=False"])
def test_loops_without_training_do_not_count_as_trained(setting):
    model = tiny_model().train(setting != "eval")
    with torch.set_grad_enabled(setting != "no_grad"):
        model(tokens(2, 4), 5, auxiliary=setting != "auxiliary=False")
    assert model.recurrent.lora.trained_loops == 3
    model.train()(tokens(2, 4), 5)
    assert model.recurrent.lora.trained_loops == 5


def test_training_an_adapter_with_more_loops_leaves_the_frozen_scales_as_they_are():
    model = tiny_model().train().requires_grad_(False)
    model.norm.weight.requires_grad_(True)
    model(tokens(2, 4), 5).sum().backward()
    assert model.recurrent.lora.trained_loops == 3


def test_train_and_eval_mode_use_the_same_scales():
    """What training computes is what eval mode computes, at any number of loops."""
    model, ids = tiny_model(halting=False, max_loop_iters=8), tokens(2, 5)
    for n_loops in (2, 3, 6):
        found = [model.train(training)(ids, n_loops, auxiliary=False) for training in (True, False)]
        assert_near(*found, 1e-6)


def test_every_trained_loop_has_its_own_scale():
    lora, x = trained(6, 6).train(), torch.randn(4, 8)
    for loop in range(8):
        (gradient,) = torch.autograd.grad(lora(x, loop).sum(), lora.scale.weight)
        assert gradient.abs().sum(1).nonzero().flatten().tolist() == [min(loop, 5)]


@pytest.mark.parametrize("rows", [2, 4, 6, 9])
@pytest.mark.parametrize("seen", [0, 3, 6])
def test_a_scale_table_of_another_length_is_cut_or_extended_on_load(rows, seen):
    old, x = trained(6, seen), torch.randn(2, 8)
    new = LoRAAdapter(8, 3, rows).eval()
    new.load_state_dict(old.state_dict())
    for loop in range(12):
        assert new(x, loop).isfinite().all()
    for loop in range(min(rows, max(seen, 1))):
        assert_near(new(x, loop), old(x, loop), 0.0)
    if rows >= 6:
        for loop in range(12):
            assert_near(new(x, loop), old(x, loop), 0.0)


def test_loading_does_not_modify_the_state_dict():
    state = trained(6, 6).state_dict()
    LoRAAdapter(8, 3, 2).load_state_dict(state)
    assert state["scale.weight"].shape == (6, 3)


def test_a_model_trained_with_few_loops_runs_with_many():
    torch.manual_seed(0)
    model = OpenMythos(tiny_config(lora_rank=3, max_loop_iters=8)).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens(2, 6), 3).square().mean().backward()
        optimizer.step()
    assert model.recurrent.lora is not None and model.recurrent.lora.trained_loops == 3
    with torch.no_grad():
        assert model.eval()(tokens(2, 6), 20).isfinite().all()


def test_rank_zero_means_no_adapter():
    assert tiny_model(lora_rank=0).recurrent.lora is None


def test_rows_at_different_loops_use_the_scales_of_their_loops():
    lora, x = trained(6, 5), torch.randn(4, 1, 8)
    loops = torch.tensor([[0], [3], [4], [9]])
    alone = torch.cat([lora(row[None], int(loop)) for row, loop in zip(x, loops, strict=True)])
    assert_near(lora(x, loops), alone)
