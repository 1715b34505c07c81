"""Chain sum, checked by adding the digits."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from open_mythos.tasks import UNSCORED
from open_mythos.tasks.chain_sum import ChainSum


@given(modulus=st.integers(2, 12), digits=st.integers(1, 20), seed=st.integers(0, 99))
def test_the_target_is_the_sum_at_the_equals_sign_only(modulus: int, digits: int, seed: int) -> None:
    task = ChainSum(modulus=modulus)
    ids, targets, _ = task.batch(2, digits, torch.Generator().manual_seed(seed))
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        start, *shown, equals = (task.vocab[i] for i in row)
        assert (start, equals, len(shown)) == ("START", "=", digits)
        assert wanted[:-1] == [UNSCORED] * (digits + 1)
        assert int(task.vocab[wanted[-1]]) == sum(map(int, shown)) % modulus
