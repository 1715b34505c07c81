"""Assignments in words: targets follow from the sentences, of which none is both in training and held out."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from sentences import reader, sentences

from open_mythos import tasks
from open_mythos.tasks import UNSCORED
from open_mythos.tasks.assignments import ASKS, COPIES, HAS, KNOWS
from open_mythos.tasks.english import NAMES, THINGS, VOCABULARY, encode

read = reader((HAS, COPIES, KNOWS, ASKS))


def problems(n=16, difficulty=3, seed=0, **options):
    task = tasks.load("assignments", **options)
    return task, task.batch(n, difficulty, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("difficulty", "options"),
    [(1, {}), (3, {}), (6, {"split": "held_out"}), (24, {}), (48, {"sentences": 64, "split": "held_out"})],
)
def test_targets_and_steps_follow_from_the_sentences(difficulty, options):
    task, batch = problems(8, difficulty, **options)
    assert batch.steps.shape == (*batch.ids.shape, difficulty + 1)
    counted, exact = set(), options.get("split") == "held_out"
    for ids, targets, steps in zip(batch.ids, batch.targets, batch.steps, strict=True):
        has, copies, ends = {}, {}, (ids == encode("?")[0]).nonzero().flatten().tolist()
        for sentence in sentences(task, ids):
            kind, _, (one, other, *_) = read(sentence)
            if kind is HAS:
                has[one] = other
            elif kind is COPIES:
                copies[one] = other
            elif kind is ASKS:
                place, way = ends.pop(0), [one]
                while way[-1] not in has:
                    way.append(copies[way[-1]])
                if len(way) > difficulty or (exact and len(way) < difficulty):
                    assert (steps[place] == UNSCORED).all() and targets[place] == UNSCORED
                    continue
                counted.add(len(way))
                known = [*way, *[has[way[-1]]] * (difficulty + 1)][: difficulty + 1]
                assert [task.vocab[i] for i in steps[place]] == known and targets[place] == steps[place, -1]
        assert not ends and len(set(has.values())) > 1  # otherwise the answer needs no hop
    assert max(counted) == difficulty


def test_held_out_problems_share_nothing_with_training():
    seen = {"train": (set(), set(), set()), "held_out": (set(), set(), set())}
    for split, (pairs, uses, texts) in seen.items():
        for difficulty in (1, 4, 12):
            task, batch = problems(64, difficulty, split=split)
            for ids in batch.ids:
                for sentence in sentences(task, ids):
                    _, pattern, (one, other, *_) = read(sentence)
                    uses.add((pattern, one))
                    texts.add(sentence)
                    if other in NAMES and other != one:
                        pairs.add(frozenset((one, other)))
    for train, held_out in zip(*seen.values(), strict=True):
        assert len(train) > 100 and len(held_out) > 100 and not train & held_out


def test_problems_have_the_requested_number_of_sentences():
    task = tasks.load("assignments", sentences=12, min_sentences=8)
    counts = set()
    for seed in range(30):
        batch = task.batch(2, 2, torch.Generator().manual_seed(seed))
        counts |= {task.render(ids.tolist()).count(".") for ids in batch.ids}
    assert counts == {8, 9, 10, 11, 12}
    batch = task.held_out().batch(2, 2)
    assert {task.render(ids.tolist()).count(".") for ids in batch.ids} == {12}


@pytest.mark.parametrize(("options", "message"), [
    ({"sentences": 65}, "sentences=65; there are only 96 names, so use at most 64"),
    ({"sentences": 4, "min_sentences": 4}, "min_sentences=4 is too small; use an int of at least 5"),
    ({"min_sentences": 40}, "min_sentences=40 is above sentences=32"),
    ({"split": "test"}, "split='test'"),
])  # fmt: skip
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tasks.load("assignments", **options)


def test_more_hops_than_sentences_are_refused():
    with pytest.raises(
        ValueError, match=r"difficulty=29; the difficulty of assignments is its number of hops, from 1 to 28"
    ):
        problems(2, 29)


def test_a_word_outside_of_the_vocabulary_is_refused():
    assert [VOCABULARY[i] for i in encode("Ana has a key .")] == ["Ana", "has", "a", "key", "."]
    with pytest.raises(ValueError, match=r"'kay' is not in the vocabulary of the word tasks; did you mean"):
        encode("Ana has a kay .")
    assert len(VOCABULARY) == len(set(VOCABULARY)) <= 1024 and len(NAMES) >= 64 and len(THINGS) == 16


@pytest.mark.parametrize(("sentences_", "hops", "most"), [(32, 6, 0.3), (32, 24, 0.5), (64, 48, 0.4)])
def test_answers_cannot_be_guessed_from_how_often_names_are_copied(sentences_, hops, most):
    """Guesses: the thing of the holder who is copied most often, and the most common thing."""
    right, n = Counter(), 0
    task, batch = problems(60, hops, sentences=sentences_, split="held_out")
    for ids, targets in zip(batch.ids, batch.targets, strict=True):
        has, copied = {}, Counter()
        for sentence in sentences(task, ids):
            kind, _, (one, other, *_) = read(sentence)
            if kind is HAS:
                has[one] = other
            elif kind is COPIES:
                copied[other] += 1
        holders = sorted(has, key=lambda holder: -copied[holder])
        answers = {task.vocab[i] for i in targets[targets != UNSCORED].tolist()}
        n += len(answers)
        right["most copied"] += has[holders[0]] in answers
        right["commonest"] += Counter(has.values()).most_common(1)[0][0] in answers
    assert max(right.values()) < most * n, right
