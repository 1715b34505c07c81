"""Addition, checked with Python integers."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from open_mythos.tasks import UNSCORED
from open_mythos.tasks.addition import Addition


def number(digits: list[int], base: int) -> int:
    return sum(digit * base**place for place, digit in enumerate(digits))


@given(base=st.integers(2, 12), length=st.integers(1, 30), seed=st.integers(0, 99))
def test_targets_are_the_digits_of_the_sum(base: int, length: int, seed: int) -> None:
    task = Addition(base=base)
    ids, targets, _ = task.batch(4, length, torch.Generator().manual_seed(seed))
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        assert task.vocab[row[-1]] == "="
        digits = [int(task.vocab[i]) for i in row[:-1]]
        total = number(digits[::2], base) + number(digits[1::2], base)
        assert all(target == UNSCORED for target in wanted[:-1:2])
        answer = [int(task.vocab[i]) for i in [*wanted[1::2], wanted[-1]]]
        assert len(answer) == length + 1 and number(answer, base) == total


def test_half_of_the_problems_have_long_carries() -> None:
    ids, _, _ = Addition().batch(2000, 20, torch.Generator().manual_seed(0))
    nines = ((ids[:, :-1:2] + ids[:, 1::2] - 2) == 9).float().mean(1)
    assert abs((nines > 0.5).float().mean() - 0.5) < 0.05
    assert abs(nines[nines > 0.5].mean() - 0.87) < 0.02 and abs(nines[nines <= 0.5].mean() - 0.1) < 0.02
