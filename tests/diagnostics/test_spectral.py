"""Spectral radius and loop gain, in cases where they are known."""

import pytest
import torch
from helpers import ATTENTION, tiny_model, tokens

from open_mythos.diagnostics import loop_gain, spectral_radius
from open_mythos.model import UnrolledMythos


def linear_model(**changes):
    """A model whose loop is ``A h + B e`` and nothing else."""
    model = tiny_model(state_norm=False, lora_rank=0, **changes)
    block = model.recurrent.block
    with torch.no_grad():
        for weight in (block.attn.wo.weight, block.ffn.down, block.ffn.shared.down.weight):
            weight.zero_()
    return model


def test_spectral_radius_is_the_largest_decay():
    model = tiny_model()
    with torch.no_grad():
        model.recurrent.injection.raw_A.fill_(0.25)[3] = 0.75
    assert spectral_radius(model) == 0.75


def test_loop_gain_of_a_linear_loop_is_its_spectral_radius():
    model = linear_model()
    with torch.no_grad():
        model.recurrent.injection.raw_A.uniform_(0.1, 0.5)[3] = 0.9
    assert loop_gain(model, tokens(2, 5)) == pytest.approx(0.9, rel=1e-4)


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_loop_gain_is_the_largest_eigenvalue_of_the_jacobian(attn_type):
    model, ids, n_loops = tiny_model(attn_type, halting=False), tokens(1, 3), 5
    e, ctx = model.encode(ids)
    *_, (last, _) = model.iterate(ids, n_loops)
    size = last.h.numel()
    jacobian = torch.autograd.functional.jacobian(
        lambda h: model.recurrent.step(h, e, n_loops, ctx), last.h.detach()
    ).reshape(size, size)
    radius = torch.linalg.eigvals(jacobian).abs().max().item()
    assert loop_gain(model, ids, n_loops, iterations=200) == pytest.approx(radius, rel=0.02)
    assert loop_gain(model, ids, n_loops) == pytest.approx(radius, rel=0.1)


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_loop_gain_ignores_halting_and_leaves_the_model_unchanged(attn_type):
    model = tiny_model(attn_type, gate_bias=9.0).train()
    halted, ids = loop_gain(model, tokens(1, 6), 3), tokens(1, 6)
    model.cfg.halting = False
    assert halted == loop_gain(model, ids, 3) > 0
    assert model.training and all(p.grad is None for p in model.parameters())


def test_loop_gain_is_zero_if_the_state_is_forgotten():
    model = linear_model(conv_taps=0)
    with torch.no_grad():
        model.recurrent.injection.raw_A.fill_(0.0)
        model.recurrent.injection.get_A = lambda: model.recurrent.injection.raw_A
    assert loop_gain(model, tokens(1, 3)) == 0.0


def test_too_few_iterations_are_refused():
    with pytest.raises(ValueError, match="iterations=1; use at least 2"):
        loop_gain(tiny_model(), tokens(1, 3), iterations=1)


def test_loop_gain_after_the_last_block_of_an_unrolled_model_is_refused():
    model = UnrolledMythos(tiny_model().cfg).eval()
    with pytest.raises(ValueError, match="n_loops=4 of 4 blocks"):
        loop_gain(model, tokens(1, 4))
    assert loop_gain(model, tokens(1, 4), n_loops=3, iterations=4) > 0
