"""Grouped expert products against the double loop."""

import pytest
import torch
from helpers import assert_near
from hypothesis import given
from hypothesis import strategies as st

from open_mythos.ops import one_gradient as one_gradient_module
from open_mythos.ops import product as product_module
from open_mythos.ops import rows as rows_module
from open_mythos.ops.experts import grouped_swiglu
from open_mythos.ops.reference import moe_loop
from open_mythos.ops.rows import Rows, expert_counts


@st.composite
def problems(draw):
    N, E, D, F = draw(st.integers(1, 12)), draw(st.integers(1, 6)), draw(st.integers(1, 19)), draw(st.integers(1, 19))
    K = draw(st.integers(1, E))
    torch.manual_seed(draw(st.integers(0, 1000)))
    # A few experts take all tokens, so the others are empty.
    popular = torch.randn(E) * draw(st.sampled_from([0.0, 100.0]))
    experts = (torch.rand(N, E) + popular).topk(K).indices
    parts = torch.randn(N, D), torch.randn(E, 2 * F, D), torch.randn(E, D, F), torch.rand(N, K)
    x, gate_up, down, weights = (part.requires_grad_() for part in parts)
    return x, gate_up, down, experts, weights


@given(problems())
def test_grouped_is_the_double_loop_in_outputs_and_gradients(problem):
    x, gate_up, down, experts, weights = problem
    fast, slow = grouped_swiglu(x, gate_up, down, experts, weights), moe_loop(x, gate_up, down, experts, weights)
    assert_near(fast, slow)
    inputs = dict(x=x, gate_up=gate_up, down=down, weights=weights)
    cotangent = torch.randn_like(slow)
    expected = torch.autograd.grad((slow * cotangent).sum(), list(inputs.values()))
    actual = torch.autograd.grad((fast * cotangent).sum(), list(inputs.values()))
    for name, got, wanted in zip(inputs, actual, expected, strict=True):
        assert_near(got, wanted, what=name)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.03), (torch.float16, 0.005)])
def test_half_precision(dtype, tolerance):
    torch.manual_seed(0)
    x, gate_up, down = (
        torch.randn(9, 13).to(dtype),
        (torch.randn(3, 14, 13) / 4).to(dtype),
        torch.randn(3, 13, 7).to(dtype),
    )
    experts, weights = torch.rand(9, 3).topk(2).indices, torch.rand(9, 2)
    out = grouped_swiglu(x, gate_up, down, experts, weights)
    assert out.dtype == dtype
    assert_near(out.float(), moe_loop(x.float(), gate_up.float(), down.float(), experts, weights), tolerance)


def test_an_expert_without_tokens_gets_a_gradient_of_zero():
    x, gate_up = torch.randn(4, 8), torch.randn(3, 12, 8, requires_grad=True)
    out = grouped_swiglu(x, gate_up, torch.randn(3, 8, 6), torch.tensor([[0], [2], [2], [0]]), torch.ones(4, 1))
    (gradient,) = torch.autograd.grad(out.sum(), gate_up)
    assert gradient[1].eq(0).all() and gradient[0].ne(0).any() and gradient[2].ne(0).any()


@given(st.lists(st.integers(0, 5), min_size=2, max_size=20))
def test_counts(choices):
    experts = torch.tensor(choices[: len(choices) // 2 * 2]).view(-1, 2)
    assert expert_counts(experts, 6).tolist() == [experts.eq(expert).sum() for expert in range(6)]


@pytest.mark.parametrize("width", [0, 1, 2, 100], ids=["grouped", "nearly all in the rest", "some", "no rest"])
@pytest.mark.parametrize("N, E, K, D, F", [(9, 4, 2, 13, 7), (5, 3, 3, 8, 6), (7, 5, 1, 16, 12)])
def test_both_kinds_of_layouts_are_the_double_loop(width, N, E, K, D, F, monkeypatch):
    monkeypatch.setattr(rows_module, "_best_width", lambda counts: width)
    torch.manual_seed(0)
    chosen = torch.rand(N, E).topk(K).indices
    assert Rows.of(chosen, E).width == width
    parts = torch.randn(N, D), torch.randn(E, 2 * F, D), torch.randn(E, D, F), torch.rand(N, K)
    x, gate_up, down, weights = inputs = [part.requires_grad_() for part in parts]
    fast = grouped_swiglu(x, gate_up, down, chosen, weights, scale=0.3)
    slow = moe_loop(x, gate_up * 0.3, down, chosen, weights)
    assert_near(fast, slow)
    cotangent = torch.randn_like(slow)
    for got, wanted in zip(
        torch.autograd.grad(fast, inputs, cotangent), torch.autograd.grad(slow, inputs, cotangent), strict=True
    ):
        assert_near(got, wanted)
    with torch.no_grad():
        assert_near(grouped_swiglu(x, gate_up, down, chosen, weights, scale=0.3), slow)


def test_it_compiles_and_trains():
    """Inductor cannot lower ``grouped_mm`` in float32, so compiled code calls it as an operator."""
    torch.manual_seed(0)
    parts = torch.randn(6, 5), torch.randn(3, 14, 5), torch.randn(3, 5, 7), torch.rand(6, 2)
    inputs = [part.requires_grad_() for part in parts]
    chosen = torch.rand(6, 3).topk(2).indices

    def loss(x, gate_up, down, weights):
        return grouped_swiglu(x, gate_up, down, chosen, weights).square().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        assert_near(actual, wanted)


def test_uneven_experts_are_batched_and_mostly_idle_ones_are_not():
    torch.manual_seed(0)
    skewed = (torch.rand(512, 256) + torch.randn(256) / 50).topk(4).indices
    rows = Rows.of(skewed, 256)
    assert 0 < rows.width < expert_counts(skewed, 256).max() and rows.rest
    assert len(rows.token_P) < 3 * skewed.numel()
    assert Rows.of(torch.randint(3, (512, 1)), 256).width == 0


@pytest.mark.parametrize("is_mixed", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("enough, cached", [(1, 10**6), (10**6, 10**6), (20, 100)], ids=["at once", "last", "in parts"])
def test_several_uses_have_one_gradient(is_mixed, enough, cached, monkeypatch):
    monkeypatch.setattr(one_gradient_module, "_ENOUGH", enough)
    monkeypatch.setattr(product_module, "_CACHED", cached)
    torch.manual_seed(0)
    uses = [(torch.randn(30, 16), torch.rand(30, 6).topk(2).indices, torch.rand(30, 2)) for _ in range(4)]
    gate_up, down = torch.randn(6, 16, 16).div(4).requires_grad_(), torch.randn(6, 16, 8).div(4).requires_grad_()
    expected, actual = (torch.zeros_like(gate_up), torch.zeros_like(down)), []
    for x, experts, weights in uses:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            actual.append(grouped_swiglu(x, gate_up, down, experts, weights).float().square().sum())
        slow = moe_loop(x, gate_up, down, experts, weights).square().sum()
        expected = [a + b for a, b in zip(expected, torch.autograd.grad(slow, (gate_up, down)), strict=True)]
    for got, wanted in zip(torch.autograd.grad(sum(actual), (gate_up, down)), expected, strict=True):
        assert got.dtype == torch.float32
        assert_near(got, wanted, 0.03 if is_mixed else 2e-5)
