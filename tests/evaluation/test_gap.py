"""The value of a loop, computed from losses that follow from a known exponent."""

from __future__ import annotations

import math

import pytest

from open_mythos.evaluation.gap import OverSeeds, gap_closed, loop_exponent, over_seeds

ONCE, LOOPED, LOOPS = 260_000, 180_000, 8


def losses(phi: float, alpha: float = 0.2, scale: float = 30.0) -> tuple[float, float, float]:
    """Of single, looped and unrolled: ``scale * N^-alpha``."""
    single, at_r, unrolled = (scale * (ONCE + LOOPS**p * LOOPED) ** -alpha for p in (0.0, phi, 1.0))
    return single, at_r, unrolled


@pytest.mark.parametrize("phi", [-0.3, 0.0, 0.22, 0.46, 1.0, 1.2])
@pytest.mark.parametrize("alpha", [0.05, 0.3])
def test_loop_exponent_recovers_the_exponent_of_the_losses(phi: float, alpha: float) -> None:
    nats = losses(phi, alpha)
    assert loop_exponent(nats, ONCE, LOOPED, LOOPS) == pytest.approx(phi, abs=1e-9)
    bits = tuple(x / math.log(2) for x in nats)
    assert loop_exponent(bits, ONCE, LOOPED, LOOPS) == pytest.approx(phi, abs=1e-9)  # type: ignore[arg-type]


def test_loop_exponent_is_none_where_it_is_undefined() -> None:
    assert loop_exponent((2.0, 1.9, 2.0), ONCE, LOOPED, LOOPS) is None, "no gap"
    assert loop_exponent((2.0, 1.9, 1.996), ONCE, LOOPED, LOOPS, least=0.005) is None, "hardly a gap"
    assert loop_exponent((2.0, 1.9, 1.8), ONCE, LOOPED, 1) is None, "no loop"
    assert loop_exponent((2.0, 9.0, 1.8), ONCE, LOOPED, LOOPS) is None, "worse than with no looped weights"


def test_gap_closed() -> None:
    assert gap_closed((2.2, 2.2, 2.0)) == 0.0
    assert gap_closed((2.2, 2.05, 2.0)) == pytest.approx(0.75)
    assert gap_closed((2.2, 2.3, 2.0)) == pytest.approx(-0.5), "a loop may harm"
    assert gap_closed((-0.6, -0.9, -0.8)) == pytest.approx(1.5), "accuracies, negated"
    assert gap_closed((2.0, 1.5, 2.0)) is None and gap_closed((2.004, 1.5, 2.0), 0.005) is None


def test_over_seeds_skips_missing_values_and_gives_an_interval() -> None:
    found = over_seeds([0.1, None, 0.5, 1.5])
    assert found is not None and (found.seeds, found.worst) == (3, 0.1)
    assert found.mean == pytest.approx(0.7)
    half = 4.30 * math.sqrt(0.52) / math.sqrt(3)  # Student's t for 2 degrees of freedom; the variance is .52
    assert (found.low, found.high) == (pytest.approx(0.7 - half), pytest.approx(0.7 + half)), "not clipped to 0 and 1"
    assert over_seeds([None, 0.25]) == OverSeeds(0.25, 0.25, None, None, 1)
    assert over_seeds([None, None]) is None
