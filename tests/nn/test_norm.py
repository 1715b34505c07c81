"""RMSNorm, in every precision."""

import pytest
import torch
from helpers import assert_near

from open_mythos.nn.linear import RMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [300.0, 60000.0, 1.0])
def test_inputs_of_equal_magnitude_are_normalised_to_plus_minus_one(dtype, size):
    """300 squared is more than float16 can hold."""
    signs = torch.randint(2, (4, 64)) * 2.0 - 1.0
    norm = RMSNorm(64).to(dtype)
    out = norm((signs * size).to(dtype))
    assert out.dtype == dtype
    assert_near(out.float(), signs / (1 + norm.eps / size**2) ** 0.5, torch.finfo(dtype).eps)


def test_formula_and_gradients():
    torch.manual_seed(0)
    norm, x = RMSNorm(10), torch.randn(3, 5, 10, requires_grad=True)
    norm.weight.data.normal_()
    slow = norm.weight * x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    assert_near(norm(x), slow)
    cotangent = torch.randn_like(slow)
    expected = torch.autograd.grad((slow * cotangent).sum(), (x, norm.weight))
    for actual, wanted in zip(
        torch.autograd.grad((norm(x) * cotangent).sum(), (x, norm.weight)), expected, strict=True
    ):
        assert_near(actual, wanted)


def test_zeros_stay_zeros():
    assert RMSNorm(8)(torch.zeros(2, 8)).eq(0).all()


def test_small_half_precision_inputs_do_not_vanish():
    x = torch.full((1, 16), 1e-2, dtype=torch.float16)  # its square is close to float16's smallest normal number
    assert_near(RMSNorm(16).half()(x).float(), torch.ones(1, 16), 0.01)
