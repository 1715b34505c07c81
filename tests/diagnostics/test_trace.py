"""A trace matches what the model computes, and leaves the model unchanged."""

from itertools import pairwise

import pytest
import torch
from helpers import ATTENTION, left_padding, loops_used, tiny_model, tokens

import open_mythos
from open_mythos.diagnostics import trace
from open_mythos.nn.feed_forward import MoEFFN

LOOPS = 5


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("halting", [True, False])
def test_traced_logits_and_loops_match_the_model(attn_type, halting):
    model, ids = tiny_model(attn_type, halting=halting), tokens(2, 9)
    found = trace(model, ids, LOOPS)
    with torch.no_grad():
        assert torch.equal(found.logits, model(ids, LOOPS))
    assert found.loops_used.dtype == torch.int64
    assert torch.equal(found.loops_used, loops_used(model, ids, LOOPS))
    assert (len(found.loops_used.unique()) > 1) is halting, "this model should halt at different loops"


def test_loops_used_follow_from_the_halting_probabilities():
    model = tiny_model()
    found = trace(model, tokens(2, 9), LOOPS)
    mass = found.halting.cumsum(0)
    expected = 1 + (mass[:-1] < model.cfg.act_threshold).sum(0)
    assert torch.equal(found.loops_used, expected)


def test_delta_is_the_change_between_states_of_model_iterate():
    model, ids = tiny_model(), tokens(2, 7)
    found = trace(model, ids, LOOPS)
    with torch.no_grad():
        states = [model.first_state(*model.encode(ids))] + [state.h for state, _ in model.iterate(ids, LOOPS)]
    for loop, (before, after) in enumerate(pairwise(states)):
        torch.testing.assert_close(found.delta[loop], (after - before).norm(dim=-1) / after.norm(dim=-1))
        assert torch.equal(found.delta[loop] > 0, found.loops_used > loop)


def test_expert_load_counts_every_choice_of_a_running_position_once():
    model, ids = tiny_model(), tokens(2, 8)
    mask = left_padding([5, 8], 8)
    for halting in (True, False):
        model.cfg.halting = halting
        found = trace(model, ids, LOOPS, mask)
        running = torch.stack([(found.loops_used > loop).sum() for loop in range(LOOPS)])
        assert torch.equal(found.expert_load.sum(1), (running * model.cfg.n_experts_per_tok).float())
        assert (found.loops_used[~mask] == 0).all()
        assert (found.delta[:, ~mask] == 0).all()


def test_a_padded_row_has_the_trace_of_the_row_alone():
    model, ids = tiny_model(), tokens(2, 8)
    mask = left_padding([5, 8], 8)
    both, alone, whole = trace(model, ids, LOOPS, mask), trace(model, ids[:1, 3:], LOOPS), trace(model, ids[1:], LOOPS)
    assert torch.equal(both.loops_used[:1, 3:], alone.loops_used)
    torch.testing.assert_close(both.delta[:, :1, 3:], alone.delta)
    assert torch.equal(both.expert_load, alone.expert_load + whole.expert_load)


def test_loops_after_all_positions_halted_show_no_change():
    model, ids = tiny_model(gate_bias=9.0), tokens(2, 6)
    found = trace(model, ids, LOOPS)
    assert (found.loops_used == 1).all()
    assert found.halting.shape == found.delta.shape == (LOOPS, 2, 6)
    assert (found.delta[0] > 0).all() and (found.delta[1:] == 0).all()
    assert (found.expert_load[0] > 0).any() and (found.expert_load[1:] == 0).all()
    assert (found.halting[1:] == found.halting[1]).all() and (found.halting[0] != found.halting[1]).any()
    with torch.no_grad():
        assert torch.equal(found.logits, model(ids, LOOPS))


def test_tracing_padding_only():
    found = trace(tiny_model(), tokens(1, 4), LOOPS, torch.zeros(1, 4))
    assert (found.loops_used == 0).all() and (found.expert_load == 0).all() and found.halting.shape == (LOOPS, 1, 4)


def test_a_replaced_expert_forward_is_used_and_counted():
    model, ids = tiny_model(), tokens(1, 6)
    ffn, called = model.recurrent.block.ffn, []
    ffn.forward = lambda x: called.append(x) or MoEFFN.forward(ffn, x)
    found = trace(model, ids, LOOPS)
    assert called and found.expert_load.sum() == found.loops_used.sum() * model.cfg.n_experts_per_tok


@pytest.mark.parametrize("n_experts", [4, 0])
def test_experts_of_all_blocks_of_a_core_are_counted_together(n_experts):
    model, ids = tiny_model(core_layers=2, n_experts=n_experts, gate_bias=1.0), tokens(2, 6)
    found, cfg = trace(model, ids, LOOPS), model.cfg
    assert found.expert_load.shape == (LOOPS, n_experts)
    assert found.expert_load.sum() == (found.loops_used.sum() * 2 * cfg.n_experts_per_tok if n_experts else 0)
    assert found.loops_used.unique().numel() > 1


def test_tracing_leaves_the_model_unchanged():
    model = tiny_model(dropout=0.5).train()
    model.coda.eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not trace(model, tokens(1, 6)).logits.requires_grad
    with pytest.raises(ValueError, match="input_ids holds 99"):
        trace(model, torch.tensor([[99]]))
    assert [module.training for module in model.modules()] == modes
    assert not model.recurrent.block.ffn._forward_pre_hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_default_loops_and_public_name():
    model = tiny_model()
    assert len(trace(model, tokens(1, 3)).delta) == model.cfg.max_loop_iters
    assert open_mythos.trace is trace


def test_experts_of_an_unrolled_model_are_counted_by_loop():
    model = open_mythos.model.UnrolledMythos(tiny_model(halting=False).cfg).eval()
    n_loops, n_chosen = model.cfg.max_loop_iters, model.cfg.n_experts_per_tok
    load = trace(model, tokens(2, 8), n_loops).expert_load
    assert load.shape == (n_loops, model.cfg.n_experts) and (load.sum(1) == 16 * n_chosen).all()
