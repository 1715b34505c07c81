"""A process that keeps the others waiting is named."""

from __future__ import annotations

from open_mythos.training.parallel.pace import WINDOW, Pace


def message(*own: float, step: float = 1.0) -> str:
    pace = Pace()
    found = [pace.add(list(own), step) for _ in range(WINDOW)]
    assert not any(found[:-1]) and not pace.add(list(own), step)  # each window is measured by itself
    return found[-1]


def test_a_process_that_is_much_slower_than_the_others_is_named() -> None:
    assert message(0.2, 0.5, 0.2, 0.2).startswith(
        "process 1 is slow: the last 50 steps took 50 s, of which its own work was 25 s"
    )
    assert message(0.5, 0.2).startswith("process 0 is slow")


def test_small_differences_in_speed_are_not_reported() -> None:
    assert not message(0.2, 0.29) and not message(0.01, 0.05) and not message(0.7)
