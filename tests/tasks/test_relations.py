"""Questions over people and relations: targets follow from the facts; no sentence is both in training and held out."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from sentences import reader, sentences

from open_mythos import tasks
from open_mythos.tasks import UNSCORED
from open_mythos.tasks.english import NAMES, RELATIONS, encode
from open_mythos.tasks.relations import ASKS, FACTS

read = reader((FACTS,))


def problems(n=16, difficulty=3, **options):
    task = tasks.load("relations", **options)
    return task, task.batch(n, difficulty, torch.Generator().manual_seed(0))


def question(sentence: str) -> tuple[str, str, list[str]]:
    """Pattern, person and path of relations."""
    (asks,) = (pattern for pattern in ASKS.patterns if sentence.startswith(pattern.removesuffix("{0}")))
    name, *path = sentence.removeprefix(asks.removesuffix("{0}")).removesuffix(" ?").split(" 's ")
    return asks, name, path


def learned(task) -> dict[tuple[str, str], str]:
    """All memorised facts, as asked by questions of one hop."""
    facts = {}
    for seed in range(6):
        batch = task.batch(200, 1, torch.Generator().manual_seed(seed))
        for ids, targets in zip(batch.ids, batch.targets, strict=True):
            _, name, path = question(sentences(task, ids)[0])
            who = task.vocab[targets.max()]
            assert facts.setdefault((name, path[0]), who) == who != name
    return facts


@pytest.mark.parametrize(
    ("difficulty", "options"),
    [
        (1, {}), (3, {}), (2, {"sentences": 12}), (6, {"split": "held_out"}),
        (6, {"relations": 5, "min_sentences": 20, "split": "held_out"}), (2, {"sentences": 12, "split": "held_out"}),
        (3, {"facts": "weights"}), (6, {"facts": "weights", "split": "held_out", "people": 20, "seed": 4}),
    ],
)  # fmt: skip
def test_targets_and_steps_follow_from_the_facts(difficulty, options):
    task, batch = problems(12, difficulty, **options)
    memorised = learned(tasks.load("relations", **options)) if task.facts == "weights" else None
    if memorised:
        assert len(memorised) == task.people * task.relations
        assert len({who for (_, which), who in memorised.items() if which == "boss"}) == task.people
    assert batch.steps.shape == (*batch.ids.shape, task.n_steps(difficulty))
    assert batch.ids.shape[1] <= task.length(difficulty)
    for ids, targets, steps in zip(batch.ids, batch.targets, batch.steps, strict=True):
        facts, asked_for, prompt = memorised or {}, list[str](), sentences(task, ids)
        expected = torch.full_like(steps, UNSCORED)
        stops, ends = ((ids == encode(mark)[0]).nonzero().flatten().tolist() for mark in (".", "?"))
        for sentence in prompt:
            if sentence.endswith("."):
                _, _, (name, who, which, _) = read(sentence)
                assert (name, which) not in facts and name != who
                facts[name, which] = who
                expected[stops.pop(0)] = encode(who)[0]
                continue
            _, name, path = question(sentence)
            end, way = ends.pop(0), [name]
            start = end - 2 * len(path) - 1
            assert task.vocab[ids[start]] == name
            for i, which in enumerate(path, 1):
                way.append(facts[way[-1], which])
                assert task.vocab[ids[start + 2 * i]] == which
                expected[start + 2 * i] = encode(which)[0]
                expected[start + 2 * i, 2 * i - 2] = encode(way[i - 1])[0]
                expected[start + 2 * i, 2 * i - 1 :] = encode(way[i])[0]
            expected[start] = encode(name)[0]
            expected[end, 2 * len(path) :] = encode(way[-1])[0]
            assert targets[end] == encode(way[-1])[0] and len(path) in (1, difficulty)
            assert len(path) == 1 or all(one != other for one, other in zip(way, way[2:], strict=False))
            asked_for.append(name)
        assert torch.equal(steps, expected) and (targets != UNSCORED).sum() == len(asked_for)
        if memorised:
            assert len(prompt) == 1
            continue
        people = {name for name, _ in facts}
        assert len(asked_for) == 4 and len(set(asked_for)) == min(4, len(people))
        if len(path) == difficulty > 1 or task.split == "held_out":
            assert len(facts) == len(people) * task.relations and set(facts.values()) <= people
            assert all(len({facts[p, r] for q, r in facts if q == p}) > 1 for p in people)


@pytest.mark.parametrize(("size", "low", "high"), [(0.0, 20, 40), (1.0, 48, 60)])
def test_in_half_of_the_smallest_prompts_person_or_relation_alone_decides(size, low, high):
    task, seen = tasks.load("relations").sized(size), Counter()
    for seed in range(60):
        ids = task.batch(1, 3, torch.Generator().manual_seed(seed)).ids[0]
        prompt = sentences(task, ids)
        facts = [read(sentence)[2] for sentence in prompt if sentence.endswith(".")]
        people, which = {name for name, *_ in facts}, {which for _, _, which, _ in facts}
        seen[min(len(people), 3), min(len(which), 4)] += 1
        assert (len(question(prompt[-1])[2]) == 3) == (len(people) > 2 and len(which) == 3)
    assert set(seen) == {(3, 1), (2, 4), (3, 3)} and low < seen[3, 3] < high


def test_held_out_problems_share_nothing_with_training():
    seen = {"train": (set(), set(), set()), "held_out": (set(), set(), set())}
    for split, (pairs, uses, texts) in seen.items():
        for difficulty in (1, 2, 4):
            task, batch = problems(48, difficulty, split=split)
            for ids in batch.ids:
                for sentence in sentences(task, ids):
                    if sentence.endswith("."):
                        _, pattern, (name, who, *_) = read(sentence)
                        pairs.add(frozenset((name, who)))
                    else:
                        pattern, name, _ = question(sentence)
                    uses.add((pattern, name))
                    texts.add(sentence)
    for train, held_out in zip(*seen.values(), strict=True):
        assert len(train) > 100 and len(held_out) > 100 and not train & held_out


@pytest.mark.parametrize("hops", [2, 4])
def test_longer_paths_over_memorised_facts_are_held_out(hops):
    paths = []
    for split in ("train", "held_out"):
        task, batch = problems(400, hops, facts="weights", split=split, people=16)
        paths.append({(name, *path) for name, path in (question(sentences(task, ids)[0])[1:] for ids in batch.ids)})
    assert min(map(len, paths)) > 30 and not paths[0] & paths[1]


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("hops", [2, 3])
def test_answers_cannot_be_guessed_from_the_names_in_a_prompt(split, hops):
    """Guesses: the most frequent name, the last one, the one in the question, a fact of that person, and those with the
    last relation of the path, among ten people."""
    right, shares, n = Counter(), [], 0
    task, batch = problems(100, hops, split=split, min_sentences=30)
    for ids, targets in zip(batch.ids, batch.targets, strict=True):
        prompt = sentences(task, ids)
        facts = [read(sentence)[2][:3] for sentence in prompt if sentence.endswith(".")]
        objects = Counter(who for _, who, _ in facts)
        answers = [task.vocab[i] for i in targets if i != UNSCORED]
        asked = [question(sentence)[1:] for sentence in prompt if sentence.endswith("?")]
        for answer, (name, path) in zip(answers, asked, strict=True):
            guesses = {
                "most": objects.most_common(1)[0][0], "last": facts[-1][1], "asked": name,
                "own": next(who for whose, who, _ in facts if whose == name),
                "own, last relation": next(who for whose, who, which in facts if (whose, which) == (name, path[-1])),
                "last relation": Counter(who for _, who, which in facts if which == path[-1]).most_common(1)[0][0],
            }  # fmt: skip
            n += 1
            right.update(guess for guess, who in guesses.items() if who == answer)
        steps = [next(who for whose, who, which in facts if (whose, which) == (name, path[0])) for name, path in asked]
        shares.append(Counter(steps).most_common(1)[0][1] / len(steps))
    assert max(right.values()) < 0.25 * n, right
    assert sum(shares) / len(shares) < 0.5  # mostly at most two of four questions lead to the same next person


def test_prompts_have_the_requested_number_of_facts():
    task = tasks.load("relations", sentences=24, min_sentences=18)
    batches = [task.batch(1, 2, torch.Generator().manual_seed(seed)) for seed in range(20)]
    counts = {task.render(batch.ids[0].tolist()).count(".") for batch in batches}
    assert {18, 21, 24} <= counts <= set(range(18, 25))
    assert task.render(task.held_out().batch(1, 2).ids[0].tolist()).count(".") == 24
    assert task.sized(0).sentences == 18 and task.sized(1).sentences == 24
    small, grown = (tasks.load("relations").sized(size) for size in (0.12, 0.16))  # 4 people, then at least 6
    assert (small.min_sentences, small.sentences, grown.min_sentences) == (12, 14, 18)
    assert tasks.load("relations", sentences=15).sized(1).sentences == 15


@pytest.mark.parametrize(("options", "message"), [
    ({"sentences": 193}, f"sentences=193; there are only {len(NAMES)} names, so use at most 192"),
    ({"min_sentences": 40}, "min_sentences=40 is above sentences=30; lower min_sentences or raise sentences"),
    ({"min_sentences": 11}, "min_sentences=11; use at least 12: 4 people, 3 relations each"),
    ({"relations": 1}, "relations=1 is too small"),
    ({"relations": 13}, f"relations=13 is too large; use an int of at least 2 and at most {len(RELATIONS)}"),
    ({"people": 97}, "people=97 is too large"),
    ({"facts": "memory"}, "facts='memory'"),
    ({"split": "test"}, "split='test'"),
])  # fmt: skip
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tasks.load("relations", **options)


def test_fewer_than_one_hop_are_refused():
    with pytest.raises(ValueError, match=r"difficulty=0; the difficulty of relations is its number of hops, from 1 up"):
        problems(2, 0)


def test_the_number_of_facts_is_limited_by_the_names():
    """With one relation each, facts are as many as people, of whom there are no more than names."""
    task = tasks.load("relations", sentences=180, min_sentences=180).sized(0)  # many have one relation each
    generator = torch.Generator().manual_seed(0)
    facts = {task.render(task.batch(1, 1, generator).ids[0].tolist()).count(".") for _ in range(24)}
    assert facts > {180}, "some have fewer"
