"""Grouped expert products against the double loop."""

import pytest
import torch
from helpers import assert_near
from hypothesis import given
from hypothesis import strategies as st

from open_mythos.ops import experts as experts_module
from open_mythos.ops.experts import grouped_mm, swiglu_experts
from open_mythos.ops.reference import moe_loop


@st.composite
def problems(draw):
    N, E, D, F = draw(st.integers(1, 12)), draw(st.integers(1, 6)), draw(st.integers(1, 19)), draw(st.integers(1, 19))
    K = draw(st.integers(1, E))
    torch.manual_seed(draw(st.integers(0, 1000)))
    # A few experts take all tokens, so the others are empty.
    popular = torch.randn(E) * draw(st.sampled_from([0.0, 100.0]))
    experts = (torch.rand(N, E) + popular).topk(K).indices
    parts = torch.randn(N, D), torch.randn(E, 2 * F, D), torch.randn(E, D, F), torch.rand(N, K), torch.randn(N, D)
    x, gate_up, down, weights, to = (part.requires_grad_() for part in parts)
    return x, gate_up, down, experts, weights, to


@given(problems(), st.booleans())
def test_outputs_and_gradients_equal_the_double_loop(problem, has_shared):
    x, gate_up, down, experts, weights, to = problem
    options = ((0.7, 1.5), to if has_shared else None)
    fast = swiglu_experts(x, gate_up, down, experts, weights, *options)
    slow = moe_loop(x, gate_up * 0.7, down * 1.5, experts, weights) + (to if has_shared else 0)
    assert_near(fast, slow)
    with torch.no_grad():
        assert_near(swiglu_experts(x, gate_up, down, experts, weights, *options), slow)
    inputs = dict(x=x, gate_up=gate_up, down=down, weights=weights) | (dict(to=to) if has_shared else {})
    cotangent = torch.randn_like(slow)
    expected = torch.autograd.grad((slow * cotangent).sum(), list(inputs.values()))
    actual = torch.autograd.grad((fast * cotangent).sum(), list(inputs.values()))
    for name, got, wanted in zip(inputs, actual, expected, strict=True):
        assert_near(got, wanted, 5e-5, what=name)


@torch.no_grad()
@pytest.mark.parametrize("N, K, gathered", [(1, 2, True), (4, 2, True), (5, 2, False)])
def test_few_tokens_gather_their_matrices_instead_of_a_grouped_product(N, K, gathered, monkeypatch):
    calls, plain = [], experts_module.grouped_mm
    monkeypatch.setattr(experts_module, "grouped_mm", lambda *args: calls.append(1) or plain(*args))
    x, gate_up, down = torch.randn(N, 7), torch.randn(4, 10, 7), torch.randn(4, 7, 5)
    chosen, weights = torch.rand(N, 4).topk(K).indices, torch.rand(N, K)
    assert_near(swiglu_experts(x, gate_up, down, chosen, weights), moe_loop(x, gate_up, down, chosen, weights))
    assert bool(calls) != gathered


def test_large_matrices_are_not_gathered_on_a_gpu(monkeypatch):
    """Gathered copies have to be written and read once more; they pay only if grouped products wait for the device."""
    are_gathered, cpu, gpu = experts_module._are_gathered, torch.empty(1, 8), torch.empty(1, 8, device="meta")
    assert are_gathered(cpu, 4, 2**26) and are_gathered(gpu, 4, 2**20) and not are_gathered(gpu, 4, 2**26)
    assert not are_gathered(gpu, 9, 1) and not are_gathered(gpu.requires_grad_(), 4, 1)
    monkeypatch.setattr(experts_module, "grouping_waits", lambda x: True)
    assert are_gathered(torch.empty(1, 8, device="meta"), 4, 2**26)


@pytest.mark.parametrize("N", [2, 9])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.03), (torch.float16, 0.005), (torch.float64, 1e-12)])
def test_other_dtypes_stay_within_their_tolerance(dtype, tolerance, N):
    torch.manual_seed(0)
    x, gate_up, down = (
        torch.randn(N, 13).to(dtype),
        (torch.randn(3, 14, 13) / 4).to(dtype),
        torch.randn(3, 13, 7).to(dtype),
    )
    experts, weights = torch.rand(N, 3).topk(2).indices, torch.rand(N, 2, dtype=torch.float64)
    out = swiglu_experts(x, gate_up, down, experts, weights)
    assert out.dtype == dtype
    expected = moe_loop(x.double(), gate_up.double(), down.double(), experts, weights)
    assert_near(out.double(), expected, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_autocast_sets_the_dtype_of_products(dtype):
    gate_up, down = torch.randn(3, 12, 8).to(dtype), torch.randn(3, 8, 6).to(dtype)
    for N in (2, 9):
        x, chosen, weights = torch.randn(N, 8).to(dtype), torch.rand(N, 3).topk(2).indices, torch.rand(N, 2)
        with torch.autocast("cpu", torch.bfloat16):
            out = swiglu_experts(x, gate_up, down, chosen, weights)
        assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.bfloat16)


def test_an_expert_without_tokens_gets_a_gradient_of_zero():
    x, gate_up = torch.randn(4, 8), torch.randn(3, 12, 8, requires_grad=True)
    out = swiglu_experts(x, gate_up, torch.randn(3, 8, 6), torch.tensor([[0], [2], [2], [0]]), torch.ones(4, 1))
    (gradient,) = torch.autograd.grad(out.sum(), gate_up)
    assert gradient[1].eq(0).all() and gradient[0].ne(0).any() and gradient[2].ne(0).any()


def test_zero_tokens_give_an_empty_result():
    out = swiglu_experts(torch.randn(0, 8), torch.randn(3, 12, 8), torch.randn(3, 8, 6),
                         torch.zeros(0, 2, dtype=torch.int64), torch.ones(0, 2))  # fmt: skip
    assert out.shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=6), K=st.integers(1, 9), N=st.integers(1, 9))
def test_grouped_mm_equals_a_separate_product_for_each_group(dtype, counts, K, N):
    ends = torch.tensor(counts).cumsum(0).int()
    x, weight = torch.randn(sum(counts), K, dtype=dtype), torch.randn(len(counts), N, K, dtype=dtype).transpose(1, 2)
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    fast = grouped_mm(x, weight, ends)
    slow = torch.cat([part @ matrix for part, matrix in zip(x.split(counts), weight, strict=True)])
    assert_near(fast, slow)
    cotangent = torch.randn_like(slow)
    expected = torch.autograd.grad(slow, inputs, cotangent)
    for got, wanted in zip(torch.autograd.grad(fast, inputs, cotangent), expected, strict=True):
        assert_near(got, wanted)


def test_compiled_experts_have_the_same_gradients():
    """Inductor cannot lower ``grouped_mm`` in float32, so compiled code calls it as an operator."""
    torch.manual_seed(0)
    parts = torch.randn(6, 5), torch.randn(3, 14, 5), torch.randn(3, 5, 7), torch.rand(6, 2)
    inputs = [part.requires_grad_() for part in parts]
    chosen = torch.rand(6, 3).topk(2).indices

    def loss(x, gate_up, down, weights):
        return swiglu_experts(x, gate_up, down, chosen, weights).square().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        assert_near(actual, wanted)
