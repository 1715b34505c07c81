"""Fused, local and convolving attention against explicit softmax and loops."""

import pytest
import torch
from helpers import assert_near, left_padding
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from open_mythos.ops import reference
from open_mythos.ops.attention import attend, attend_convolved, attend_local
from open_mythos.ops.conv import causal_conv
from open_mythos.ops.mask import CausalMask


def allowed(T: int, S: int, valid: Tensor | None, positions: Tensor | None, window: int | None = None) -> Tensor:
    """(B or 1, 1, T, S), written position by position."""
    rows = 1 if valid is None and positions is None else len(valid if valid is not None else positions)  # type: ignore[arg-type]
    out = torch.zeros(rows, 1, T, S, dtype=torch.bool)
    for b in range(rows):
        for t in range(T):
            at = S - T + t if positions is None else int(positions[b, t])
            for s in range(S):
                real = valid is None or bool(valid[b, s])
                near = window is None or s > at - window
                out[b, 0, t, s] = s == at or (s < at and real and near)
    return out


@st.composite
def problems(draw):
    """q, k, v, mask parts: any split of keys into past and new, any head grouping, padding, scattered queries."""
    B, S = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    T = draw(st.integers(1, S))
    G, R, D, V = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    torch.manual_seed(draw(st.integers(0, 1000)))
    q, k, v = torch.randn(B, T, G * R, D), torch.randn(B, S, G, D), torch.randn(B, S, G, V)
    valid = left_padding([draw(st.integers(0, S)) for _ in range(B)], S) if draw(st.booleans()) else None
    positions = None
    if draw(st.booleans()):
        positions = torch.stack([torch.randperm(S)[:T].sort().values for _ in range(B)])
    return q, k, v, valid, positions


@given(problems(), st.none() | st.floats(0.1, 2.0))
def test_attend_is_explicit_softmax(problem, scale):
    q, k, v, valid, positions = problem
    mask = CausalMask(q.shape[1], k.shape[1], valid, positions)
    expected = reference.attention(
        q, k, v, allowed(q.shape[1], k.shape[1], valid, positions), q.shape[-1] ** -0.5 if scale is None else scale
    )
    assert_near(attend(q, k, v, mask, scale), expected)


@given(problems(), st.integers(1, 4), st.none() | st.floats(0.1, 2.0))
def test_attend_convolved_is_attention_to_convolved_rows(problem, n_taps, scale):
    q, k, v, valid, positions = problem
    mask = CausalMask(q.shape[1], k.shape[1], valid, positions)
    k_taps, v_taps = torch.randn(n_taps, *k.shape[2:]), torch.randn(n_taps, *v.shape[2:])
    expected = attend(
        q, reference.causal_conv(k.flatten(2), k_taps.flatten(1)).view_as(k),
        reference.causal_conv(v.flatten(2), v_taps.flatten(1)).view_as(v), mask, scale,
    )  # fmt: skip
    assert_near(attend_convolved(q, k, v, k_taps, v_taps, mask, scale), expected)


@given(problems(), st.integers(1, 11))
def test_attend_local_is_explicit_softmax_over_a_window(problem, window):
    q, k, v, valid, positions = problem
    mask = CausalMask(q.shape[1], k.shape[1], valid, positions)
    seen = allowed(q.shape[1], k.shape[1], valid, positions, window)
    assert_near(attend_local(q, k, v, window, mask), reference.attention(q, k, v, seen, q.shape[-1] ** -0.5))


@given(problems(), st.integers(1, 4))
def test_gradients_of_both(problem, window):
    q, k, v, valid, positions = problem
    assume(q.shape[1] > 1)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    mask = CausalMask(q.shape[1], k.shape[1], valid, positions)
    for width in (None, window):
        fast = attend(q, k, v, mask) if width is None else attend_local(q, k, v, width, mask)
        seen = allowed(q.shape[1], k.shape[1], valid, positions, width)
        slow = reference.attention(q, k, v, seen, q.shape[-1] ** -0.5)
        weight = torch.randn_like(slow)
        expected = torch.autograd.grad((slow * weight).sum(), inputs)
        for name, actual, wanted in zip(
            "qkv", torch.autograd.grad((fast * weight).sum(), inputs), expected, strict=True
        ):
            assert_near(actual, wanted, what=name)


def test_the_reference_keeps_kv_heads_apart():
    """Four query heads on two kv heads: 0 and 1 read the first, 2 and 3 the second."""
    v = torch.tensor([1.0, 2.0]).view(1, 1, 2, 1).expand(1, 3, 2, 1)
    out = reference.attention(torch.randn(1, 3, 4, 5), torch.randn(1, 3, 2, 5), v, torch.ones(3, 3).tril().bool(), 1.0)
    assert_near(out[0, :, :, 0], torch.tensor([1.0, 1.0, 2.0, 2.0]).expand(3, 4))


@pytest.mark.parametrize("valid", [None, left_padding([4, 2, 0], 4)], ids=["no padding", "padding"])
def test_plain_masks_are_left_to_the_kernel(valid):
    assert CausalMask(4, 4, valid).is_plain == CausalMask(1, 4, valid).is_plain == (valid is None)
    assert not CausalMask(2, 4, valid).is_plain


def test_a_row_of_nothing_but_padding_is_finite():
    valid = torch.zeros(2, 5, dtype=torch.bool)
    q, kv = torch.randn(2, 5, 2, 4), torch.randn(2, 5, 2, 4)
    mask = CausalMask(5, 5, valid)
    assert_near(attend(q, kv, kv, mask), kv)  # each query sees itself alone
    assert_near(attend_local(q, kv, kv, 3, mask), kv)


@given(B=st.integers(1, 2), S=st.integers(1, 8), C=st.integers(1, 5), K=st.integers(1, 10))
def test_causal_conv_is_the_double_loop(B, S, C, K):
    x, taps = torch.randn(B, S, C, requires_grad=True), torch.randn(K, C, requires_grad=True)
    fast, slow = causal_conv(x, taps), reference.causal_conv(x, taps)
    assert_near(fast, slow)
    weight = torch.randn_like(slow)
    expected = torch.autograd.grad((slow * weight).sum(), (x, taps))
    for actual, wanted in zip(torch.autograd.grad((fast * weight).sum(), (x, taps)), expected, strict=True):
        assert_near(actual, wanted)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("T, S, window, Dv", [(70, 70, 6, 8), (64, 64, 33, 4), (33, 50, 6, 8), (40, 45, 50, 12)])
def test_local_attention_in_several_chunks(T, S, window, Dv, padded):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, T, 4, 8), torch.randn(3, S, 2, 8), torch.randn(3, S, 2, Dv)
    valid = left_padding([0, 7, 41], S) if padded else None
    inputs = [x.requires_grad_() for x in (q, k, v)]
    fast = attend_local(q, k, v, window, CausalMask(T, S, valid))
    slow = reference.attention(q, k, v, allowed(T, S, valid, None, window), 8**-0.5)
    assert_near(fast, slow)
    cotangent = torch.randn_like(slow)
    for got, wanted in zip(
        torch.autograd.grad(fast, inputs, cotangent), torch.autograd.grad(slow, inputs, cotangent), strict=True
    ):
        assert_near(got, wanted)
