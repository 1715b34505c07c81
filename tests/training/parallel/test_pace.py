"""A process that keeps the others waiting is named."""

from __future__ import annotations

from open_mythos.training.parallel.pace import WINDOW, Pace


def said(*own: float, step: float = 1.0) -> str:
    pace = Pace()
    found = [pace.add(list(own), step) for _ in range(WINDOW)]
    assert not any(found[:-1]) and not pace.add(list(own), step)  # each window by itself
    return found[-1]


def test_one_that_needs_much_longer_is_named() -> None:
    assert said(0.2, 0.5, 0.2, 0.2).startswith(
        "process 1 is slow: the last 50 steps took 50 s, of which its own work was 25 s"
    )
    assert said(0.5, 0.2).startswith("process 0 is slow")


def test_nobody_is_named_for_what_costs_little() -> None:
    assert not said(0.2, 0.29) and not said(0.01, 0.05) and not said(0.7)
