"""All tasks in words as one: which task each problem is from, how hard it is, and how it ends."""

from __future__ import annotations

import re

import pytest
import torch

from open_mythos import tasks
from open_mythos.tasks import UNSCORED
from open_mythos.tasks.english import END, ID, encode

MARKS = {"coins": "word_problems", "'s": "relations", "what": "assignments"}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def kind_of(sentence: str) -> str:
    """Which task a problem is from, by its question."""
    asks = sentence.removesuffix(" ?").split(" . ")[-1].split()
    if any(len(word) == 1 and word.isupper() for word in asks):
        return "registers"
    return next((kind for mark, kind in MARKS.items() if mark in asks), "relations")


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_a_batch_has_problems_of_all_tasks_in_turn(split):
    task, firsts = tasks.load("words", split=split), set()
    for seed in range(12):
        kinds = [kind_of(task.render(ids.tolist())) for ids in task.batch(8, 2, seeded(seed)).ids]
        assert sorted(kinds) == sorted(2 * ["assignments", "word_problems", "relations", "registers"])
        firsts.add(kinds[0])
    assert len(firsts) == 4, "the first problem may be from any task"


def test_each_task_with_a_weight_has_a_share_of_a_training_step():
    weights = {"registers": 6, "relations": 2}
    shares = tasks.load("words", weights=weights, settings={"relations": {"people": 12}}).shares()
    assert {share.name: share.weight for share in shares} == {"registers": 0.75, "relations": 0.25}
    for share in shares:
        kinds = {kind_of(share.task.render(ids.tolist())) for ids in share.task.batch(4, 2, seeded(0)).ids}
        assert kinds == {share.name}
    (alone,) = tasks.load("parity").shares()
    assert (alone.name, alone.weight) == ("parity", 1.0)


def test_a_held_out_batch_has_problems_of_all_tasks_in_turn():
    task = tasks.load("words").held_out()
    kinds = [kind_of(task.render(ids.tolist())) for ids in task.batch(10, 2, seeded()).ids]
    assert sorted(map(kinds.count, set(kinds))) == [2, 2, 3, 3]


@pytest.mark.parametrize("seed", range(6))
def test_the_last_question_in_training_is_followed_by_answer_and_end(seed):
    task = tasks.load("words")
    batch, ended = task.batch(8, 3, seeded(seed)), 0
    for ids, targets, steps in zip(batch.ids, batch.targets, batch.steps, strict=True):
        last = int((ids != 0).sum()) - 1
        if ids[last] == ID["?"]:  # of assignments, where the last question may not be scored
            assert targets[last] == UNSCORED
            continue
        ended += 1
        assert ids[last - 1] == ID["?"] and targets[last - 1] == ids[last]
        assert targets[last] == ID[END] and set(steps[last].tolist()) == {ID[END]}
    assert ended >= 4 and torch.equal(batch.valid if batch.valid is not None else batch.ids > 0, batch.ids != 0)
    held_out = task.held_out().batch(8, 3, seeded(seed))
    assert not (held_out.targets == ID[END]).any()


@pytest.mark.parametrize(("difficulty", "levels"), [(1, [1, 1, 1, 2]), (5, [5, 5, 3, 10]), (12, [12, 12, 6, 24])])
def test_difficulty_is_scaled_for_each_task(difficulty, levels):
    task = tasks.load("words").held_out()
    assert [task.level(part, difficulty) for part in task.parts] == levels
    batch = task.batch(4, difficulty, seeded())
    assert batch.steps.shape[2] == task.n_steps(difficulty) == 2 * difficulty + 2 * difficulty // 3 + 3
    for ids in batch.ids:
        text = task.render(ids.tolist())
        if kind_of(text) == "relations":
            assert text.count("'s") >= levels[2]
        elif kind_of(text) == "registers":
            assert len(re.findall(r" \.", text)) == 5 + levels[3]


def test_problems_get_longer_with_their_size():
    task = tasks.load("words")
    small = task.sized(0)
    assert small.most == task.most == 12 and [small.level(part, 12) for part in small.parts] == [2, 1, 6, 12]
    for seed in range(8):
        assert small.batch(2, 12, seeded(seed)).ids.shape[1] < task.batch(2, 12, seeded(seed)).ids.shape[1]


def test_settings_are_passed_to_the_tasks():
    task = tasks.load("words", weights={"word_problems": 1}, settings={"word_problems": {"people": 20, "modulus": 23}})
    assert task.most == 16 and task.chance == 1 / 23
    assert tasks.load("words", **task.to_dict()) == task
    assert encode("22")[0] in torch.cat([task.batch(40, 4, seeded(seed)).ids.flatten() for seed in range(3)])


@pytest.mark.parametrize(("options", "message"), [
    ({"weights": {"relation": 1}}, "'relation' is not a word task; did you mean 'relations'?"),
    ({"weights": {"relations": 0}}, "weights: relations=0; use a number above 0, or leave relations out"),
    ({"settings": {"maze": {}}}, "'maze' is not a word task; choose from assignments, word_problems"),
    ({"settings": {"relations": 3}}, "settings: relations=3 is not a dictionary"),
    ({"settings": {"relations": {"hops": 3}}}, "settings: relations has no option 'hops'; it has facts, relations,"),
    ({"settings": {"registers": {"modulus": 24}}}, "modulus=24 is too large"),
    ({"split": "test"}, "split='test'"),
])  # fmt: skip
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tasks.load("words", **options)


def test_more_steps_than_every_task_supports_are_refused():
    with pytest.raises(ValueError, match="difficulty=13; the difficulty of words is its number of steps, from 1 to 12"):
        tasks.load("words").batch(2, 13)
