"""The linear part of the recurrence is stable whatever training does to it."""

import pytest
import torch
from helpers import assert_near
from hypothesis import given
from hypothesis import strategies as st

from open_mythos.nn.injection import LTIInjection

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXTREMES = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1 - 2.0**-7,
    2.0**-7,
    1e-8,
    -1e-8,
    2.0,
    3.7,
    -17.3,
    1e3,
    -1e4,
    65504.0,
    1e30,
    -3e38,
]


def injection(values: list[float], dtype: torch.dtype) -> LTIInjection:
    module = LTIInjection(len(values)).to(dtype)
    limit = torch.finfo(dtype).max
    module.raw_A.data.copy_(torch.tensor(values, dtype=torch.float64).clamp(-limit, limit).to(dtype))
    return module


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=20))
def test_every_decay_is_strictly_between_0_and_1(dtype, values):
    A = injection(values + EXTREMES, dtype).get_A()
    assert A.dtype == dtype
    assert (A > 0).all() and (A < 1).all()
    assert (1 - A > 0).all() and (A * 0.5 > 0).all()  # as used in arithmetic of this dtype


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20))
def test_the_gradient_of_the_decay_is_never_zero(dtype, values):
    module = injection(values + EXTREMES, dtype)
    (gradient,) = torch.autograd.grad(module.get_A().sum(), module.raw_A)
    assert gradient.abs().eq(1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_decay_stays_in_range_after_huge_optimizer_steps(dtype):
    torch.manual_seed(0)
    module = LTIInjection(64).to(dtype)
    optimizer = torch.optim.SGD([module.raw_A], lr=1e3)
    for _ in range(5):
        h, e = torch.randn(2, 3, 64).to(dtype), torch.randn(2, 3, 64).to(dtype)
        optimizer.zero_grad()
        module(h, e).float().square().sum().backward()
        assert module.raw_A.grad is not None and module.raw_A.grad.ne(0).all()
        optimizer.step()
        A = module.get_A()
        assert (A > 0).all() and (A < 1).all()
    assert module.raw_A.abs().max() > 100  # the parameter itself is not held back


@pytest.mark.parametrize("decay", [0.01, 0.3, 0.7, 0.99])
def test_decay_and_gain_start_at_the_given_values(decay):
    module = LTIInjection(5, decay=decay, gain=0.4)
    assert_near(module.get_A(), torch.full((5,), decay), 1e-6)
    assert_near(module.B, torch.full((5,), 0.4), 1e-6)


@pytest.mark.parametrize("decay", [0.001, 0.999])
def test_an_initial_decay_near_0_or_1_stays_in_range(decay):
    A = LTIInjection(5, decay=decay).get_A()
    assert (A > 0).all() and (A < 1).all() and (A - decay).abs().max() < 0.02


def test_the_decay_is_continuous_in_its_parameter():
    values = torch.linspace(-3, 3, 20001)
    A = injection(values.tolist(), torch.float32).get_A()
    assert A.diff().abs().max() <= values.diff().abs().max() * 1.01


def test_one_step_is_a_h_plus_b_e_plus_the_transformer():
    module, (h, e, out) = LTIInjection(4), torch.randn(3, 2, 5, 4)
    linear = module.get_A() * h + module.B * e
    assert_near(module(h, e), linear, 1e-6)
    assert_near(module(h, e, out), linear + out, 1e-6)
    decay, injected = module(None, e)  # the part that is the same in all loops
    assert_near(decay * h + injected, linear, 1e-6)


def test_without_a_transformer_the_state_stays_bounded():
    module = injection(EXTREMES, torch.float32)
    h, e = torch.zeros(1, len(EXTREMES)), torch.ones(1, len(EXTREMES))
    with torch.no_grad():
        for _ in range(2000):
            h = module(h, e)
    assert (h.abs() <= (module.B.abs() / (1 - module.get_A()) + 1e-3)).all()
