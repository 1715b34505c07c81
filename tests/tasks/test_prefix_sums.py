"""Prefix sums, checked by adding up."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from open_mythos.tasks.parity import Parity
from open_mythos.tasks.prefix_sums import PrefixSums


@given(modulus=st.integers(2, 12), length=st.integers(1, 40), seed=st.integers(0, 99))
def test_targets_are_the_running_sums(modulus: int, length: int, seed: int) -> None:
    ids, targets, _ = PrefixSums(modulus=modulus).batch(2, length, torch.Generator().manual_seed(seed))
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        sums = itertools.accumulate(token - 1 for token in row)
        assert wanted == [1 + total % modulus for total in sums]


def test_prefix_sums_of_bits_are_the_parity_task() -> None:
    sums, parity = (task.batch(3, 10, torch.Generator().manual_seed(0)) for task in (PrefixSums(), Parity()))
    assert torch.equal(sums.ids, parity.ids) and torch.equal(sums.targets, parity.targets)
