"""Rotary embedding against complex multiplication."""

import math

import pytest
import torch
from helpers import assert_near
from hypothesis import given
from hypothesis import strategies as st

from open_mythos.ops.reference import rope_complex
from open_mythos.ops.rope import apply_rope, precompute_rope_freqs, rope_frequencies, rope_rows, rope_table


@given(T=st.integers(1, 9), pairs=st.integers(1, 8), start=st.integers(0, 5000), theta=st.floats(2.0, 1e6))
def test_rotation_is_complex_multiplication(T, pairs, start, theta):
    x, positions = torch.randn(2, T, 3, 2 * pairs), torch.arange(start, start + T)
    expected = rope_complex(x, positions, theta)
    assert_near(apply_rope(x, rope_table(positions, 2 * pairs, theta)), expected)
    assert_near(apply_rope(x, precompute_rope_freqs(2 * pairs, start + T, theta)[start:]), expected)


@given(pairs=st.integers(1, 8), theta=st.floats(2.0, 1e6), factor=st.floats(1.0, 32.0), context=st.integers(1, 9000))
def test_wavelengths_beyond_a_context_are_stretched(pairs, theta, factor, context):
    x, positions = torch.randn(2, 5, 3, 2 * pairs), torch.tensor([0, 1, 77, 5000, 90000])
    expected = rope_complex(x, positions, theta, factor, context)
    assert_near(apply_rope(x, rope_table(positions, 2 * pairs, theta, factor, context)), expected)
    plain, stretched = (rope_frequencies(2 * pairs, theta, *more) for more in ((), (factor, context)))
    turns = context * plain / (2 * math.pi)
    assert torch.equal(stretched[turns >= 4], plain[turns >= 4])
    torch.testing.assert_close(stretched[turns <= 1], plain[turns <= 1] / factor)


def test_each_row_may_have_its_own_positions():
    x, positions = torch.randn(3, 4, 2, 6), torch.randint(100, (3, 4))
    expected = rope_complex(x, positions, 1e4)
    table = rope_table(positions, 6, 1e4)
    assert_near(apply_rope(x, table), expected)
    assert_near(apply_rope(x, torch.view_as_complex(table)), expected)


def test_gradients_equal_those_of_complex_multiplication():
    x = torch.randn(2, 5, 3, 8, requires_grad=True)
    weight = torch.randn(2, 5, 3, 8)
    fast = torch.autograd.grad((apply_rope(x, rope_table(torch.arange(5), 8, 1e4)) * weight).sum(), x)[0]
    slow = torch.autograd.grad((rope_complex(x, torch.arange(5), 1e4) * weight).sum(), x)[0]
    assert_near(fast, slow)


def test_scores_depend_on_relative_positions_and_norms_are_preserved():
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(query_at: int, key_at: int) -> float:
        rotated = [apply_rope(x, rope_table(torch.tensor([at]), 16, 1e4)) for x, at in ((q, query_at), (k, key_at))]
        assert rotated[0].norm().item() == pytest.approx(q.norm().item(), rel=1e-5)
        return (rotated[0] * rotated[1]).sum().item()

    assert score(3, 1) == pytest.approx(score(1003, 1001), abs=1e-3)
    assert score(0, 0) == pytest.approx((q * k).sum().item(), abs=1e-5)
    assert abs(score(3, 1) - score(5, 1)) > 1e-4


def test_the_table_has_unit_phasors_of_the_documented_angles():
    freqs = precompute_rope_freqs(8, 32, 100.0)
    assert freqs.shape == (32, 4) and freqs.dtype == torch.complex64
    assert_near(freqs.abs(), torch.ones(32, 4), 1e-6)
    angle = torch.tensor(7 * 100.0 ** (-4 / 8))
    assert freqs[7, 2].item() == pytest.approx(complex(math.cos(angle), math.sin(angle)), abs=1e-5)
    assert torch.equal(freqs[0], torch.ones(4, dtype=torch.complex64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_rotated_in_float32(dtype):
    x = torch.randn(1, 64, 2, 8).to(dtype)
    positions = torch.arange(4000, 4064)
    rotated = apply_rope(x, rope_table(positions, 8, 1e4))
    assert rotated.dtype == dtype
    # One rounding, at the end: half a unit in the last place of numbers below 8.
    assert_near(rotated.float(), rope_complex(x.float(), positions, 1e4), torch.finfo(dtype).eps)


def test_a_wrong_number_of_positions_is_an_error():
    with pytest.raises(RuntimeError, match="hold 32 positions and x has 8"):
        apply_rope(torch.randn(1, 8, 2, 4), precompute_rope_freqs(4, 32))


def test_rope_rows_reads_the_table_from_the_end_of_the_cache():
    table = precompute_rope_freqs(4, 20)
    assert torch.equal(rope_rows(table, 7, 3), table[7:10])
    assert torch.equal(rope_rows(torch.view_as_real(table), 7, 3), torch.view_as_real(table[7:10]))
    assert torch.equal(rope_rows(table[:3], 7, 3), table[:3])
    by_row = torch.randn(2, 3, 2, 2)
    assert rope_rows(by_row, 7, 3) is by_row


def test_the_default_dtype_does_not_affect_the_rotation():
    x, table = torch.randn(2, 9, 4, 8), rope_table(torch.arange(9), 8)
    expected = apply_rope(x, table)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(apply_rope(x, table), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_compiled_code_rotates_alike_without_complex_numbers():
    x, table = torch.randn(2, 5, 3, 8), rope_table(torch.arange(5), 8)
    compiled = torch.compile(apply_rope, fullgraph=True, backend="aot_eager")
    assert_near(compiled(x, table), apply_rope(x, table), 1e-6)


def test_rotated_channels_may_start_at_an_odd_offset():
    """As for one token with a latent of width 3."""
    x, table = torch.randn(1, 1, 1, 7), rope_table(torch.tensor([5]), 4)
    assert_near(apply_rope(x[..., 3:], table), apply_rope(x[..., 3:].clone(), table))
