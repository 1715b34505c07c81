"""Arithmetic in words: targets follow from the sentences, of which none is both in training and held out."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from sentences import reader, sentences

from open_mythos import tasks
from open_mythos.tasks import UNSCORED
from open_mythos.tasks.english import NAMES, encode
from open_mythos.tasks.word_problems import ASKS, BOTH, FEWER, HAS, MORE, SAME, TWICE

FORMULAS = {
    HAS: lambda c, *_: c,
    MORE: lambda c, one, *_: one + c,
    FEWER: lambda c, one, *_: one - c,
    TWICE: lambda c, one, *_: 2 * one,
    SAME: lambda c, one, *_: one,
    BOTH: lambda c, one, other, *_: one + other,
}


read = reader((*FORMULAS, ASKS))


def set_steps(steps: torch.Tensor, name: str, number: int, due: int) -> None:
    """The name before loop ``due``, and the number from then on."""
    steps[:due], steps[due:] = encode(f"{name} {number}")


def problems(n=16, difficulty=3, seed=0, **options):
    task = tasks.load("word_problems", **options)
    return task, task.batch(n, difficulty, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("difficulty", "options"),
    [
        (1, {}), (6, {}), (12, {}), (1, {"split": "held_out"}), (6, {"split": "held_out", "modulus": 23}),
        (12, {"split": "held_out"}), (28, {"people": 32, "split": "held_out"}),
    ],
)  # fmt: skip
def test_targets_and_steps_follow_from_the_sentences(difficulty, options):
    task, batch = problems(24, difficulty, **options)
    assert batch.steps.shape == (*batch.ids.shape, task.n_steps(difficulty))
    assert batch.ids.shape[1] <= task.length(difficulty)
    asked_for = set()
    for ids, targets, steps in zip(batch.ids, batch.targets, batch.steps, strict=True):
        value, depth, needs, start = {}, {}, {}, 0
        expected = torch.full_like(steps, UNSCORED)
        ends = [place for place, word in enumerate(ids.tolist()) if word in encode(". ?")]

        for end, sentence in zip(ends, sentences(task, ids), strict=True):
            kind, _, (name, *sources, number) = read(sentence)
            if kind is ASKS:
                sources = [name]
                set_steps(expected[end], name, value[name], depth[name] + 2)
                asked_for.add(len(needs[name]))
                assert set(value) - needs[name] and targets[end] == encode(str(value[name]))[0]
            else:
                sources = [source for source in sources if source]  # in earlier sentences, or KeyError
                value[name] = FORMULAS[kind](int(number or 0), *[value[s] for s in sources], 0, 0) % task.modulus
                depth[name] = 1 + max((depth[s] for s in sources), default=-1)
                needs[name] = {name, *(p for s in sources for p in needs[s])} if sources else set()
                set_steps(expected[end], name, value[name], depth[name] + 1)
            for source in sources:
                set_steps(expected[start + sentence.split().index(source)], source, value[source], depth[source] + 2)
            start = end + 1
        assert torch.equal(steps, expected) and (targets != UNSCORED).sum() == 1
    assert max(asked_for) == difficulty and (task.split == "train" or asked_for == {difficulty})


def test_held_out_problems_share_nothing_with_training():
    seen = {"train": (set(), set(), set()), "held_out": (set(), set(), set())}
    for split, (pairs, uses, texts) in seen.items():
        for difficulty in (1, 4, 12):
            task, batch = problems(32, difficulty, split=split)
            for ids in batch.ids:
                for sentence in sentences(task, ids):
                    _, pattern, words = read(sentence)
                    names = {word for word in words[:3] if word}
                    uses.add((pattern, words[0]))
                    texts.add(sentence)
                    pairs |= {frozenset((a, b)) for a in names for b in names if a < b}
    for train, held_out in zip(*seen.values(), strict=True):
        assert len(train) > 100 and len(held_out) > 100 and not train & held_out


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_answers_cannot_be_guessed_from_the_numbers_in_a_problem(split):
    """Guesses: the first, last, most frequent number, a constant, the asked person's own, the sum. Chance is .143."""
    right, kinds, n = Counter(), Counter(), 0
    for seed in range(2):
        task, batch = problems(150, 6, seed, split=split)
        for ids, targets in zip(batch.ids, batch.targets, strict=True):
            answer, problem = task.vocab[targets.max()], sentences(task, ids)
            numbers = [word for word in task.render(ids.tolist()).split() if word.isdigit()]
            asked = read(problem[-1])[2][0]
            kind, _, words = next(found for found in map(read, problem) if found[2][0] == asked)
            guesses = {
                "most": Counter(numbers).most_common(1)[0][0], "first": numbers[0], "last": numbers[-1],
                "constant": "2", "own": words[3], "sum": str(sum(map(int, numbers)) % 7),
            }  # fmt: skip
            n += 1
            kinds[kind] += 1
            right.update(guess for guess, number in guesses.items() if number == answer)
    assert HAS not in kinds and min(kinds.values()) > n / 20, kinds
    assert max(right.values()) < 0.2 * n, right


def test_no_person_is_a_source_of_most_others():
    """On average, the person used most often is less than a quarter of all sources in a problem."""
    task, batch = problems(64, 6)
    shares = []
    for ids in batch.ids:
        sources = Counter(name for sentence in sentences(task, ids) for name in read(sentence)[2][1:3] if name)
        shares.append(max(sources.values()) / sources.total())
    assert sum(shares) / len(shares) < 0.25


def test_problems_have_the_requested_number_of_people():
    task = tasks.load("word_problems", people=9, min_people=7)
    counts = {len(sentences(task, task.batch(1, 2, torch.Generator().manual_seed(s)).ids[0])) for s in range(30)}
    assert counts == {8, 9, 10}  # and the question
    assert len(sentences(task, task.held_out().batch(1, 2).ids[0])) == 10
    assert task.sized(0).people == 7 and task.sized(1).people == 9


def test_small_problems_only_copy_and_larger_ones_use_every_operation():
    """Small problems copy computed numbers and do not calculate with them."""
    task, kinds = tasks.load("word_problems", people=9, min_people=7), []
    numbers, computed_used = {}, {}
    for size in (0.0, 0.12, 0.16, 0.28, 1.0):
        small = task.sized(size)
        batch = small.batch(64, min(small.most, 3), torch.Generator().manual_seed(0))
        parsed = [[read(sentence) for sentence in sentences(small, ids)] for ids in batch.ids]
        kinds.append({kind for problem in parsed for kind, *_ in problem})
        numbers[size] = {word for word in small.render(batch.ids.flatten().tolist()).split() if word.isdigit()}
        computed_used[size] = set()
        for problem in parsed:
            own = {words[0] for kind, _, words in problem if kind is HAS}
            computed_used[size] |= {kind for kind, _, words in problem[:-1] if not {w for w in words[1:3] if w} <= own}
    assert numbers[0.16] == {"0", "1", "2"} and numbers[0.0] == numbers[1.0] == set("0123456")
    assert kinds[0] == kinds[1] == {HAS, SAME, ASKS}
    assert kinds[2] == kinds[3] == kinds[4] == {HAS, SAME, TWICE, MORE, FEWER, BOTH, ASKS}
    assert all(computed_used[size] == {SAME} for size in (0.0, 0.12, 0.16, 0.28)) and len(computed_used[1.0]) == 5
    assert [task.sized(size).most for size in (0.0, 0.28, 0.32, 1.0)] == [2, 2, 3, 5]  # operations
    assert tasks.load("word_problems", people=5).sized(0).most == 1


@pytest.mark.parametrize(("options", "message"), [
    ({"people": 33}, f"people=33; there are only {len(NAMES)} names, so use at most 32"),
    ({"min_people": 20}, "min_people=20 is above people=16; lower min_people or raise people"),
    ({"min_people": 4}, "min_people=4 is too small"),
    ({"modulus": 8}, "modulus=8 is even; use an odd one such as 7 or 23"),
    ({"modulus": 25}, "modulus=25 is too large"),
    ({"split": "test"}, "split='test'"),
])  # fmt: skip
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tasks.load("word_problems", **options)


@pytest.mark.parametrize("difficulty", [0, 13])
def test_an_invalid_number_of_operations_is_refused(difficulty):
    with pytest.raises(
        ValueError,
        match=rf"difficulty={difficulty}; the difficulty of word_problems is its number of operations, from 1 to 12",
    ):
        problems(2, difficulty)
