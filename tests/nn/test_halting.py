"""The gate, and who runs after it has spoken, against the plain formula."""

import pytest
import torch
from helpers import tiny_model
from hypothesis import given
from hypothesis import strategies as st

from open_mythos.nn.halting import ACTHalting, HaltingState
from open_mythos.ops import reference

four = st.lists(st.sampled_from([0.0, 0.1, 0.4, 0.5, 0.9, 0.99, 1.0]), min_size=4, max_size=4)
probabilities = st.lists(four, min_size=1, max_size=8)


def test_the_gate_is_a_probability_for_each_position():
    gate = tiny_model().recurrent.act
    p = gate(torch.randn(3, 5, 32) * 100)
    assert p.shape == (3, 5) and len(p.unique()) == 15
    assert (p >= 0).all() and (p <= 1).all()


def test_a_new_gate_treats_all_states_alike_and_halts_none_early():
    p = ACTHalting(16)(torch.randn(3, 5, 16))
    assert len(p.unique()) == 1 and p.max() < 0.05


@given(probabilities, st.floats(0.05, 1.0))
def test_weights_sum_to_one_for_every_number_of_loops(table, threshold):
    p = torch.tensor(table).unsqueeze(1)  # (loops, 1, 4)
    states = torch.randn(len(p), 1, 4, 6)
    output, weights, used = reference.halting(states, p, threshold)
    assert torch.equal(weights.sum(0), torch.ones(1, 4))
    assert (used >= 1).all() and (used <= len(p)).all()
    for position in range(4):
        assert torch.equal(output[0, position], states[used[0, position] - 1, 0, position])


@given(probabilities, st.floats(0.05, 1.0))
def test_halting_state_is_the_plain_formula(table, threshold):
    p = torch.tensor(table).unsqueeze(1)
    _, _, used = reference.halting(torch.zeros(len(p), 1, 4, 1), p, threshold)
    halting = HaltingState(torch.ones(1, 4, dtype=torch.bool), threshold)
    ran = torch.zeros(1, 4, dtype=torch.int64)
    for row in p:
        ran += halting.running
        halting.update(row)
    assert torch.equal(ran, used)


def test_what_has_halted_stays_so():
    halting = HaltingState(torch.tensor([[True, True, False]]), 0.5)
    for p, running in (([0.4, 0.5, 0.0], [1, 0, 0]), ([0.05, 0.0, 0.0], [1, 0, 0]), ([0.2, 0.0, 0.0], [0, 0, 0])):
        halting.update(torch.tensor([p]))
        assert halting.running.tolist() == [[bool(x) for x in running]]
    assert halting.mass[0, 1] == 0.5 and halting.mass[0, 2] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mass_is_summed_in_single_precision(dtype):
    """A hundred probabilities of 0.01 reach 0.99; summed in bfloat16 they would stick at 0.5 or so."""
    halting = HaltingState(torch.ones(1, 1, dtype=torch.bool), 0.9)
    for _ in range(100):
        halting.update(torch.full((1, 1), 0.01, dtype=dtype))
    assert halting.mass.dtype == torch.float32 and not halting.running.any()


def test_no_gradient_flows_through_the_decision():
    halting = HaltingState(torch.ones(1, 2, dtype=torch.bool), 0.5)
    halting.update(torch.tensor([[0.2, 0.6]], requires_grad=True))
    assert not halting.mass.requires_grad
