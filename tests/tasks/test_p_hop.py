"""p-hop, checked by following the pairs one at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from open_mythos.tasks import UNSCORED
from open_mythos.tasks.p_hop import PHop


@given(st.data())
def test_each_question_mark_is_answered_one_hop_further(data: st.DataObject) -> None:
    symbols = data.draw(st.integers(3, 40))
    hops = data.draw(st.integers(1, symbols - 1))
    questions = data.draw(st.integers(1, min(4, symbols)))
    task = PHop(symbols=symbols, questions=questions)
    ids, targets, _ = task.batch(2, hops, torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        names = [task.vocab[i] for i in row]
        pairs, asked = names[: 2 * symbols], names[2 * symbols :]
        assert all(key.endswith(">") for key in pairs[::2])
        successor = {key.removesuffix(">"): value for key, value in zip(pairs[::2], pairs[1::2], strict=True)}
        assert set(successor) == set(successor.values()) == set(task.vocab[1 : symbols + 1])
        assert wanted[: 2 * symbols] == [UNSCORED] * (2 * symbols)
        starts = asked[:: hops + 1]
        assert len(set(starts)) == len(starts) == questions
        for i, here in enumerate(starts):
            own = slice(i * (hops + 1), (i + 1) * (hops + 1))
            assert asked[own] == [here] + ["?"] * hops
            unscored, *answers = wanted[2 * symbols :][own]
            assert unscored == UNSCORED
            seen = [here]
            for answer in answers:
                here = successor[here]
                seen.append(here)
                assert task.vocab[answer] == here
            assert len(set(seen)) == hops + 1, "one cycle holds all symbols"


def test_starts_and_the_order_of_pairs_are_uniform() -> None:
    ids, _, _ = PHop(symbols=4).batch(8000, 1, torch.Generator().manual_seed(0))
    keys, start = ids[:, :8:2] - 4, ids[:, 8]
    for column in (keys[:, 0], keys[:, 1], start):
        assert (column.bincount(minlength=5)[1:] / 8000 - 0.25).abs().max() < 0.02
    assert ((keys[:, 0] == start).float().mean() - 0.25).abs() < 0.02, "the start may be the key of any pair"


def test_more_questions_than_starts_are_refused() -> None:
    with pytest.raises(ValueError, match="questions=5, but there are only 4 symbols to start from"):
        PHop(symbols=4, questions=5)
