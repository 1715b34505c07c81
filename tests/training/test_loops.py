"""Loop counts follow their schedule, stay within bounds, and depend on the given generator alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from open_mythos.training.config import LoopConfig
from open_mythos.training.objective import draw_loops

SCHEDULES = ("fixed", "uniform", "poisson", "lognormal", "curriculum", "by_length")


def drawn(progress=0.5, n=4000, length=10, seed=0, **changes):
    cfg = LoopConfig(**{"per": "sequence", "minimum": 2, "maximum": 12, "mean": 6.0, **changes})
    return draw_loops(cfg, progress, n, length, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(low=st.integers(1, 9), width=st.integers(0, 9), seed=st.integers(0, 99))
def test_counts_stay_within_bounds_and_depend_on_the_generator_alone(schedule, low, width, seed):
    torch.manual_seed(seed)
    first = drawn(n=50, seed=seed, schedule=schedule, minimum=low, maximum=low + width)
    assert first.dtype == torch.int64 and first.min() >= low and first.max() <= low + width
    torch.manual_seed(seed + 1)
    assert torch.equal(first, drawn(n=50, seed=seed, schedule=schedule, minimum=low, maximum=low + width))


def test_per_batch_draws_one_count_and_per_sequence_many():
    assert len(drawn(per="batch").unique()) == 1
    assert len(drawn(per="sequence").unique()) > 5


def test_fixed_always_gives_the_mean():
    assert drawn(schedule="fixed").unique().tolist() == [6]


def test_uniform_is_even_over_the_whole_range():
    counts = drawn(schedule="uniform", n=22_000).bincount()
    assert counts[:2].sum() == 0 and len(counts) == 13
    assert counts[2:].min() > 1700 and counts[2:].max() < 2300


def test_poisson_and_lognormal_have_the_mean_and_lognormal_the_longer_tail():
    poisson = drawn(schedule="poisson", minimum=1, maximum=500).float()
    lognormal = drawn(schedule="lognormal", minimum=1, maximum=500).float()
    assert abs(poisson.mean() - 6) < 0.3 and abs(lognormal.mean() - 6) < 0.4
    assert abs(poisson.var() - 6) < 0.8
    assert lognormal.var() > poisson.var() + 3  # mean + mean^2 (exp(sigma^2) - 1) = 16
    assert drawn(schedule="lognormal", sigma=0.0, minimum=1, maximum=500).float().var() < 7


def test_curriculum_grows_to_its_maximum():
    greatest = [int(drawn(schedule="curriculum", progress=p, ramp=0.5).max()) for p in (0.0, 0.25, 0.5, 1.0)]
    assert greatest == [2, 7, 12, 12]


def test_by_length_gives_per_token_loops_rounded_up():
    assert drawn(schedule="by_length", length=10, per_token=0.5).unique().tolist() == [5]
    assert drawn(schedule="by_length", length=11, per_token=0.5).unique().tolist() == [6]
