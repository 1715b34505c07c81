"""Mixtures of texts: which text and row is at which place depends on the place and the seed only."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from open_mythos.tasks import mixture
from open_mythos.tasks.mixture import Deal, joined, parsed


def deal(weights: list[float], n_rows: list[int]) -> Deal:
    return Deal([Fraction(str(weight)) for weight in weights], n_rows)


@pytest.mark.parametrize(
    "weights", [[1], [2, 1], [0.7, 0.3], [1, 1, 1], [90, 9, 1], [0.997, 0.003], [3.14159, 2.71828, 0.1]]
)
def test_texts_are_read_in_proportion_to_their_weights(weights: list[float]) -> None:
    n, shares = 200_000, [weight / sum(weights) for weight in weights]
    found = deal(weights, [10**6] * len(weights)).seen(n, seed=5)
    assert sum(found) == n
    for count, share in zip(found, shares, strict=True):
        assert count / n == pytest.approx(share, rel=0.01)


def test_every_1024_places_have_each_text_in_proportion() -> None:
    """Each block of 1024 places has exactly its share of each text."""
    texts = [text for text, _ in deal([3, 1], [99, 99]).find(range(8192), 0)]
    for first in range(0, 8192, 1024):
        assert texts[first : first + 1024].count(1) == 256
    assert texts[:1024] != texts[1024:2048], "in another order in each block"


@settings(max_examples=12)
@given(
    n_rows=st.lists(st.integers(1, 40), min_size=1, max_size=4), ordered=st.sampled_from([1, 3, 7, 1000]),
    seed=st.integers(0, 3),
)  # fmt: skip
def test_each_text_has_epochs_of_its_own(n_rows: list[int], ordered: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "ORDERED", ordered)
        dealt = deal([1 + i for i in range(len(n_rows))], n_rows)
        places = 1000
        found = list(dealt.find(range(places), seed))
        for text, n in enumerate(n_rows):
            rows = [row for one, row in found if one == text]
            assert dealt.seen(places, seed)[text] == len(rows)
            for start in range(0, len(rows) - n, n):
                assert sorted(rows[start : start + n]) == list(range(n)), "every row once per epoch"
            assert n < 9 or ordered < 1000 or rows[:n] != rows[n : 2 * n], "in another order in the next epoch"


def test_rows_depend_only_on_place_and_seed() -> None:
    one, other = deal([2, 1], [50, 7]), deal([2, 1], [50, 7])
    whole = list(one.find(range(4000), 3))
    for place in [3999, 0, 2500, 17, 2501, 1023, 1024]:
        assert list(other.find([place], 3)) == [whole[place]]
    assert whole != list(deal([2, 1], [50, 7]).find(range(4000), 4)), "another seed"
    assert [row for _, row in deal([1], [99]).find(range(99), 3)] != [
        row for _, row in deal([1], [99]).find(range(99), 4)
    ]
    assert [row for text, row in whole if text == 0][:50] != [row for text, row in whole if text == 1][:50]


def test_the_row_order_of_a_single_text_is_unchanged() -> None:
    for n in (100, 33):
        found = [row for _, row in deal([1], [n]).find(range(2 * n), seed=0)]
        orders = [torch.randperm(n, generator=torch.Generator().manual_seed(turn)) for turn in (0, 1)]
        assert found == torch.cat(orders).tolist()


def test_a_long_text_is_read_in_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    """No part of it is read much earlier than another, and no permutation is longer than ``ORDERED``."""
    monkeypatch.setattr(mixture, "ORDERED", 100)
    dealt = deal([1], [1050])
    rows = [row for _, row in dealt.find(range(1050), 0)]
    assert sorted(rows) == list(range(1050)) and all(len(order) <= 100 for _, order in dealt._kept.values())
    first = Counter(row // 105 for row in rows[:96])
    assert len(first) == 10 and max(first.values()) <= 11


def test_large_seeds_are_accepted() -> None:
    assert list(deal([1, 1], [9, 9]).find(range(9), (1 << 63) - 1))


def test_sources_are_parsed_into_names_and_weights(tmp_path: pytest.TempPathFactory) -> None:
    assert parsed("docs/") == [("docs/", 1)] and parsed("hf:a/b:2020") == [("hf:a/b:2020", 1)]
    found = parsed("docs/:2, src/*.py:0.5,hf:a/b:part")
    assert found == [("docs/", 2), ("src/*.py", Fraction(1, 2)), ("hf:a/b:part", 1)]
    assert joined(found) == "docs/:2,src/*.py:0.5,hf:a/b:part:1" and parsed(joined(found)) == found
    assert joined(parsed("stdlib")) == "stdlib"
    there = f"{tmp_path}/a,b"
    assert parsed(there)[0][0] == f"{tmp_path}/a"


def test_an_existing_path_with_a_comma_is_one_text(tmp_path: pytest.TempPathFactory) -> None:
    path = f"{tmp_path}/a,b.txt"
    with open(path, "w") as file:
        file.write("x")
    assert parsed(path) == [(path, 1)]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a:1,b:0", "has 'b' at weight 0; leave it out, or use a weight above 0"),
        ("a:1,a:2", "has 'a' twice; name it once"),
        ("a,,b", "has an empty name beside a comma"),
        (",".join(map(str, range(300))), "has 300 texts; use at most 256"),
    ],
)
def test_invalid_mixtures_are_refused(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parsed(source)
