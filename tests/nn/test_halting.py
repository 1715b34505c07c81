"""The halting gate, and the exit that sums its probabilities, against the plain formula."""

import pytest
import torch
from helpers import assert_near, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from plain_halting import halting
from torch import Tensor

from open_mythos.nn.exits import Gate, LoopState
from open_mythos.nn.halting import ACTHalting, relative_change

four = st.lists(st.sampled_from([0.0, 0.1, 0.4, 0.5, 0.9, 0.99, 1.0]), min_size=4, max_size=4)
probabilities = st.lists(four, min_size=1, max_size=8)


def decisions(gate: Gate, p: Tensor) -> Tensor:
    """(loops, B, T) whether the exit halts at each loop, for probabilities (loops, B, T)."""
    carried, found = gate.init(torch.zeros(*p.shape[1:], 2)), []
    for loop, row in enumerate(p):
        state = LoopState(loop, torch.zeros(*row.shape, 2), torch.ones_like(row, dtype=torch.bool))
        state.halting = row
        stops, carried = gate.check(carried, state)
        found.append(stops)
    return torch.stack(found)


def test_the_gate_returns_a_probability_for_each_position():
    gate = tiny_model().recurrent.act
    p = gate(torch.randn(3, 5, 32) * 100)
    assert p.shape == (3, 5) and len(p.unique()) == 15
    assert (p >= 0).all() and (p <= 1).all()


def test_the_gate_depends_on_how_far_a_state_has_moved():
    gate = tiny_model().recurrent.act
    h = torch.randn(3, 5, 32)
    moved, resting = gate(h, torch.full((3, 5), 0.5)), gate(h, torch.full((3, 5), 0.005))
    assert (moved != resting).all()
    # changes below what bfloat16 resolves
    assert_near(gate(h, torch.full((3, 5), 1e-6)), gate(h, torch.full((3, 5), 1e-7)), 1e-3)


def test_relative_change_is_relative_to_the_new_state():
    before = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    after = torch.tensor([[6.0, 8.0], [0.0, 2.0], [0.0, 0.0], [1.0, 0.0]])
    assert relative_change(before, after).tolist() == [0.5, 1.0, 0.0, 0.0]
    assert relative_change(before.bfloat16(), after.bfloat16()).dtype == torch.float32


def test_an_untrained_gate_is_constant_and_halts_nothing_early():
    p = ACTHalting(16)(torch.randn(3, 5, 16))
    assert len(p.unique()) == 1 and p.max() < 0.05


@given(probabilities, st.floats(0.05, 1.0))
def test_weights_sum_to_one_for_every_number_of_loops(table, threshold):
    p = torch.tensor(table).unsqueeze(1)  # (loops, 1, 4)
    states = torch.randn(len(p), 1, 4, 6)
    output, weights, used = halting(states, p, threshold)
    assert torch.equal(weights.sum(0), torch.ones(1, 4))
    assert (used >= 1).all() and (used <= len(p)).all()
    for position in range(4):
        assert torch.equal(output[0, position], states[used[0, position] - 1, 0, position])


@given(probabilities, st.floats(0.05, 1.0))
def test_the_gate_exit_equals_the_plain_formula(table, threshold):
    p = torch.tensor(table).unsqueeze(1)
    _, _, used = halting(torch.zeros(len(p), 1, 4, 1), p, threshold)
    may_stop = decisions(Gate(threshold), p)
    may_stop[-1] = True  # all stop at the last loop
    assert torch.equal(may_stop.int().argmax(0) + 1, used)


def test_a_position_that_may_stop_may_stop_at_every_later_loop():
    p = torch.tensor([[[0.4, 0.5]], [[0.05, 0.0]], [[0.2, 0.0]], [[0.0, 0.0]]])
    assert decisions(Gate(0.5), p).tolist() == [[[False, True]], [[False, True]], [[True, True]], [[True, True]]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halting_probabilities_are_summed_in_float32(dtype):
    """A hundred probabilities of 0.01 reach 0.99; summed in bfloat16 they would stick at 0.5 or so."""
    found = decisions(Gate(0.9), torch.full((100, 1, 1), 0.01, dtype=dtype))
    assert found[-1].all() and not found[80].any()


def test_no_gradient_flows_through_the_halting_decision():
    p = torch.tensor([[0.2, 0.6]], requires_grad=True)
    state = LoopState(0, torch.zeros(1, 2, 3), torch.ones(1, 2).bool())
    state.halting = p
    _, (mass,) = Gate(0.5).check(Gate(0.5).init(state.h), state)
    assert not mass.requires_grad


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.1, float("nan")])
def test_thresholds_outside_0_to_1_are_refused(threshold):
    with pytest.raises(ValueError, match="threshold="):
        Gate(threshold)


@torch.no_grad()
def test_a_replaced_output_layer_of_the_gate_is_called():
    """As an adapter on this layer has to be."""
    gate, h = ACTHalting(16), torch.randn(2, 3, 16)
    before = gate(h)
    gate.halt = torch.nn.Sequential(gate.halt, torch.nn.Hardtanh(2.0 * gate.std, 3.0 * gate.std))
    gate.halt.in_features = 16
    assert (gate(h) > 0.5).all() and (before < 0.5).all()
