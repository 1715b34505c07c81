"""Running parity, checked by counting."""

from __future__ import annotations

import torch

from open_mythos.tasks.parity import VOCAB_SIZE, parity_batch


def test_targets_are_the_parity_so_far() -> None:
    ids, targets = parity_batch(5, 9, torch.Generator().manual_seed(3))
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        for t in range(9):
            ones = sum(token == 2 for token in row[: t + 1])
            assert wanted[t] == 1 + ones % 2
    assert ids.max() < VOCAB_SIZE


def test_a_generator_repeats() -> None:
    first, again = (parity_batch(4, 6, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
