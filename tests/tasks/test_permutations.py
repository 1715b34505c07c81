"""Products of permutations, checked by moving items."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from open_mythos.tasks.permutations import Permutations

GENERATORS = ("all", "transpositions", "adjacent")


@given(
    size=st.integers(3, 5), generators=st.sampled_from(GENERATORS), length=st.integers(1, 20), seed=st.integers(0, 99)
)
def test_targets_are_the_running_products(size: int, generators: str, length: int, seed: int) -> None:
    task = Permutations(size=size, generators=generators)
    ids, targets, _ = task.batch(3, length, torch.Generator().manual_seed(seed))
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        places = {str(thing): str(thing) for thing in range(1, size + 1)}  # where each thing now is
        for token, answer in zip(row, wanted, strict=True):
            step = task.vocab[token]
            places = {thing: step[int(place) - 1] for thing, place in places.items()}
            assert task.vocab[answer] == "".join(places.values())


def test_the_first_permutation_is_applied_first() -> None:
    """Two swaps that do not commute: 1 goes to 2 and on to 3."""
    task = Permutations(size=3, generators="adjacent")
    first, then = task.vocab.index("213"), task.vocab.index("132")
    ids, targets, _ = task.batch(64, 2, torch.Generator().manual_seed(0))
    (row, *_) = (ids == torch.tensor([first, then])).all(1).nonzero()[0].tolist()
    assert task.vocab[targets[row, 1]] == "312"


def test_only_the_chosen_generators_are_drawn() -> None:
    for generators, count in zip(GENERATORS, (120, 10, 4), strict=True):
        task = Permutations(generators=generators)
        drawn = {task.vocab[i] for i in task.batch(100, 40, torch.Generator().manual_seed(0)).ids.flatten().tolist()}
        assert len(drawn) == count and ("12345" in drawn) == (generators == "all")
    assert drawn == {"21345", "13245", "12435", "12354"}
