"""Attention, norms and SwiGLUs in C are PyTorch's operations, outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_near
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from open_mythos.nn.halting import ACTHalting
from open_mythos.ops import attention_kernel
from open_mythos.ops import kernels as kernels_module
from open_mythos.ops import swiglu as swiglu_module
from open_mythos.ops.attention_kernel import attend_few, attend_heads
from open_mythos.ops.conv import causal_conv
from open_mythos.ops.experts import grouped_swiglu
from open_mythos.ops.gate import relative_change
from open_mythos.ops.kernels import kernels
from open_mythos.ops.linear import linear
from open_mythos.ops.mask import CausalMask, document_starts
from open_mythos.ops.norm import rms_norm
from open_mythos.ops.reference import attention, moe_loop
from open_mythos.ops.rope import apply_rope, rope_table
from open_mythos.ops.rows import greatest
from open_mythos.ops.swiglu import swiglu, weighted, weighted_backward

pytestmark = pytest.mark.skipif(kernels() is None, reason="no C code: no gcc, no AVX-512, or OPEN_MYTHOS_NATIVE=0")


def gradients(made, inputs):
    cotangent = torch.randn(made.shape, generator=torch.Generator().manual_seed(7))
    return torch.autograd.grad((made.float() * cotangent).sum(), inputs)


def masks(kind, B, T, S):
    """Masks of B rows whose last T of S tokens ask."""
    if kind == "plain":
        return CausalMask(T, S)
    if kind == "padded":
        valid = torch.arange(S) >= torch.randint(0, S, (B, 1))
        return CausalMask(T, S, valid & (torch.rand(B, S) < 0.9))
    numbers = torch.rand(B, S).lt(0.2).cumsum(1) + 1
    return CausalMask(T, S, starts=document_starts(numbers))


def by_pytorch(q, k, v, mask, scale, n_local, window):
    """The slow twin, with the heads' window."""
    seen = mask.dense(q.device).expand(len(q), q.shape[2], -1, -1).clone()
    at = torch.arange(mask.n_keys - mask.n_queries, mask.n_keys).unsqueeze(1)
    seen[:, :n_local] &= torch.arange(mask.n_keys) > at - window
    return attention(q, k, v, seen, scale)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 150), st.integers(0, 90), st.sampled_from([(4, 2), (6, 1), (3, 3)]),
    st.integers(1, 40), st.integers(1, 40), st.sampled_from(["plain", "padded", "documents"]), st.integers(0, 3),
    st.integers(1, 80),
)  # fmt: skip
def test_attention_is_that_of_all_scores(B, T, before, heads, D, V, kind, n_local, window):
    (H, G), S = heads, T + before
    q, k, v = (torch.randn(B, n, h, d, requires_grad=True) for n, h, d in ((T, H, D), (S, G, D), (S, G, V)))
    mask = masks(kind, B, T, S)
    made = attend_heads(q, k, v, mask, 0.3, n_local, window)
    expected = by_pytorch(q, k, v, mask, 0.3, n_local, window)
    assert_near(made, expected)
    for grad, wanted in zip(gradients(made, (q, k, v)), gradients(expected, (q, k, v)), strict=True):
        assert_near(grad, wanted)


def test_attention_is_the_reference_in_half_precision_and_for_strides_of_any_kind():
    q, k, v = (torch.randn(2, 8, h, 70).transpose(1, 3) for h in (4, 2, 2))  # (2, 70, H, 8), channels far apart
    expected = by_pytorch(q, k, v, CausalMask(70, 70), 8**-0.5, 0, 0)
    assert_near(attend_heads(q, k, v, CausalMask(70, 70), 8**-0.5, 0, 0), expected)
    halves = [x.bfloat16() for x in (q, k, v)]
    made = attend_heads(*halves, CausalMask(70, 70), 8**-0.5, 0, 0)
    assert made.dtype == torch.bfloat16
    assert_near(made.float(), expected, 2e-2)


def test_huge_scores_have_finite_gradients():
    """As in a model that an optimizer has run away with."""
    q, k, v = (torch.randn(1, 90, 2, 16).mul(s).requires_grad_() for s in (1e4, 1e4, 1.0))
    made = attend_heads(q, k, v, CausalMask(90, 90), 0.25, 1, 5)
    assert all(grad.isfinite().all() for grad in gradients(made, (q, k, v)))


def test_long_texts_are_read_in_blocks_that_fit():
    q, k, v = (torch.randn(1, n, 2, 8) for n in (40, 9000, 9000))
    mask = CausalMask(40, 9000)
    assert_near(attend_heads(q, k, v, mask, 0.3, 1, 3000), by_pytorch(q, k, v, mask, 0.3, 1, 3000))
    assert not attention_kernel.is_native(q[:, :1], k, CausalMask(1, 9000)), "one query is the decoder's work"


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 6), st.integers(0, 700), st.sampled_from([(4, 2), (6, 1), (3, 3)]),
    st.integers(1, 40), st.integers(1, 40), st.sampled_from(["plain", "padded"]), st.integers(0, 3), st.integers(1, 80),
    st.integers(1, 6), st.sampled_from(["apart", "same", "beside"]),
)  # fmt: skip
@torch.no_grad()
def test_few_queries_read_rows_that_are_convolved_first(B, T, before, heads, D, V, kind, n_local, window, K, values):
    (H, G), S = heads, T + before
    q, k = torch.randn(B, T, H, D), torch.randn(B, G, S, D).transpose(1, 2)  # as a cache has them
    k_taps, mask, beside = torch.randn(K, G, D), masks(kind, B, T, S), None
    v, v_taps = (k, k_taps) if values == "same" else (torch.randn(B, S, G, V), torch.randn(K, G, V))
    if values == "beside":
        beside = torch.randn(B, T, H, 7), torch.randn(B, S, G, 7)
    made = attend_few(q, k, v, k_taps, v_taps, mask, 0.3, n_local, window, beside)
    k, v = (causal_conv(x.flatten(2), taps.flatten(1)).view_as(x) for x, taps in ((k, k_taps), (v, v_taps)))
    if beside is not None:
        q, k = torch.cat([q, beside[0]], -1), torch.cat([k, beside[1]], -1)
    assert_near(made, by_pytorch(q, k, v, mask, 0.3, n_local, window))


@torch.no_grad()
@pytest.mark.parametrize("D, width", [(32, 16), (7, 5), (50, 33)])
def test_experts_of_a_few_tokens_are_the_double_loop(D, width):
    x, gate_up, down = torch.randn(3, D), torch.randn(4, 2 * width, D), torch.randn(4, D, width)
    chosen, weights = torch.tensor([[0, 3], [1, 1], [2, 0]]), torch.rand(3, 2)
    expected = moe_loop(x, gate_up, down, chosen, weights)
    assert_near(grouped_swiglu(x, gate_up, down, chosen, weights), expected)


@pytest.mark.parametrize("B, T, H, D", [(2, 3, 4, 6), (1, 90, 8, 32), (3, 1, 1, 2)])
@pytest.mark.parametrize("for_each", [False, True])
def test_turning(B, T, H, D, for_each):
    positions = torch.randint(99, (B, T) if for_each else (T,))
    table = rope_table(positions, D)
    x = torch.randn(B, T, 3 * H, D, requires_grad=True)
    part = x[:, :, H : 2 * H]  # heads side by side, tokens apart
    pairs = torch.view_as_complex(part.unflatten(-1, (-1, 2)))
    expected = torch.view_as_real(pairs * torch.view_as_complex(table).unsqueeze(-2)).flatten(-2)
    made = apply_rope(part, table)
    assert_near(made, expected)
    assert_near(gradients(made, (x,))[0], gradients(expected, (x,))[0])


@pytest.mark.parametrize("shape", [(3, 7, 19), (40, 256), (5, 1, 1)])
@pytest.mark.parametrize("has_weight", [False, True])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_norms(shape, has_weight, n_threads, threads):
    threads(n_threads)
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(shape[-1], requires_grad=True) if has_weight else None
    made, expected = rms_norm(x, weight, 1e-5), F.rms_norm(x, shape[-1:], weight, 1e-5)
    inputs = (x, weight) if has_weight else (x,)
    assert_near(made, expected)
    for grad, wanted in zip(gradients(made, inputs), gradients(expected, inputs), strict=True):
        assert_near(grad, wanted)


@pytest.mark.parametrize("n_rows, width", [(1, 1), (33, 17), (64, 80)])
def test_swiglus(n_rows, width, monkeypatch):
    monkeypatch.setattr(swiglu_module, "_ENOUGH", 0)
    gate, up = (torch.randn(2, n_rows, width).mul(9).requires_grad_() for _ in range(2))
    made, expected = swiglu(gate, up), F.silu(gate) * up
    assert_near(made, expected)
    for grad, wanted in zip(gradients(made, (gate, up)), gradients(expected, (gate, up)), strict=True):
        assert_near(grad, wanted)
    hidden, weight = torch.randn(n_rows, 2 * width, requires_grad=True), torch.rand(n_rows, 1, requires_grad=True)
    expected = F.silu(hidden[:, :width]) * hidden[:, width:] * weight
    assert_near(weighted(hidden.detach(), weight.detach()), expected)
    grad = torch.randn(n_rows, width)
    wanted = torch.autograd.grad(expected, (hidden, weight), grad)
    grad_hidden, grad_weight, again = weighted_backward(grad.clone(), hidden.detach(), weight.detach())
    for found, known in zip((grad_hidden, grad_weight, again), (wanted[0], wanted[1].flatten(), expected), strict=True):
        assert_near(found, known)


def test_whoever_watches_or_transforms_operations_gets_pytorchs_own():
    x = torch.randn(300, 64)
    with FlopCounterMode(display=False) as counter:
        linear(x, torch.randn(64, 64))
    assert counter.get_total_flops() == 2 * 300 * 64 * 64
    each = torch.func.vmap(lambda row: rms_norm(row, None))(x)
    assert_near(each, rms_norm(x, None))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert rms_norm(torch.empty(300, 64)).shape == (300, 64)


@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 5, 19)])
@pytest.mark.parametrize("moves", [False, True])
def test_a_gate_says_what_its_layers_say(shape, moves, monkeypatch):
    gate, h, before = ACTHalting(shape[-1]), torch.randn(shape), torch.randn(shape)
    for weight in gate.parameters():
        torch.nn.init.normal_(weight, std=gate.std)

    @torch.no_grad()
    def asked():
        change = relative_change(before, h)
        return change, gate(h, change if moves else None)

    native = asked()
    monkeypatch.setattr(kernels_module, "kernels", lambda: None)
    for found, expected in zip(native, asked(), strict=True):
        assert found.shape == shape[:-1]
        assert_near(found, expected)
    assert relative_change(torch.zeros(shape), torch.zeros(shape)).eq(0).all()


@torch.no_grad()
def test_another_output_layer_of_a_gate_is_asked():
    """As an adapter on it is."""
    gate, h = ACTHalting(16), torch.randn(2, 3, 16)
    before = gate(h)
    gate.halt = torch.nn.Sequential(gate.halt, torch.nn.Hardtanh(2.0 * gate.std, 3.0 * gate.std))
    gate.halt.in_features = 16
    assert (gate(h) > 0.5).all() and (before < 0.5).all()


def test_another_default_dtype_changes_no_turned_channel():
    x, table = torch.randn(2, 9, 4, 8), rope_table(torch.arange(9), 8)
    expected = apply_rope(x, table)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(apply_rope(x, table), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(1, 70), st.data())
def test_the_greatest_are_those_of_topk(N, E, data):
    k = data.draw(st.integers(1, E))
    logits, bias = torch.randn(N, E).mul(2).round(), torch.randn(E)  # equal ones among the logits, none among the sums
    assert torch.equal(greatest(logits, bias, k), (logits + bias).topk(k).indices)


def test_what_is_no_number_is_chosen_once_and_in_range():
    for value in (float("nan"), float("-inf"), float("inf")):
        logits = torch.full((3, 20), value)
        assert greatest(logits, torch.zeros(20), 5).sort().values.tolist() == [[0, 1, 2, 3, 4]] * 3
    logits = torch.zeros(1, 20)
    logits[0, 13] = float("nan")
    assert greatest(logits, torch.zeros(20), 2)[0].tolist() == [13, 0]
