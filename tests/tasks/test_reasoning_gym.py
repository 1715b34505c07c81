"""Generators of reasoning-gym as tasks in bytes, scored by reasoning-gym."""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest
import torch

from open_mythos import tasks
from open_mythos.tasks import UNSCORED
from open_mythos.tasks.reasoning_gym import ANSWER, END, ReasoningGym

pytest.importorskip("reasoning_gym")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_targets_are_the_bytes_of_the_answer_after_the_question() -> None:
    task = ReasoningGym(generator="chain_sum", difficulty_knob="terms")
    entries = task.entries(5, 4, seeded())
    ids, targets, valid = task.batch(5, 4, seeded())
    for i, entry in enumerate(entries):
        width = ids.shape[1] if valid is None else int(valid[i].sum())
        question, answer = entry["question"].encode(), entry["answer"].encode()
        assert ids[i, :width].tolist() == [b + 1 for b in question] + [ANSWER] + [b + 1 for b in answer]
        assert targets[i, :width].tolist() == [UNSCORED] * len(question) + [b + 1 for b in answer] + [END]
        assert width <= task.length(4) and (targets[i, width:] == UNSCORED).all()
        shown, _, asked = entry["question"].partition(": ")[2].rpartition(" =")
        assert asked == "" and eval(shown) == int(entry["answer"])


def test_difficulty_sets_minimum_and_maximum_of_the_knob() -> None:
    task = ReasoningGym(generator="chain_sum", difficulty_knob="terms", settings={"min_digits": 2, "max_digits": 2})
    for terms in (2, 5):
        for entry in task.entries(4, terms, seeded()):
            numbers = [word for word in entry["question"].split() if word.isdigit()]
            assert len(numbers) == terms and all(len(number) == 2 for number in numbers)


@pytest.mark.parametrize("generator", ["chain_sum", "list_functions", "spell_backward"])
def test_a_seed_reproduces_problems_of_generators_that_use_pythons_random(generator: str) -> None:
    task = ReasoningGym(generator=generator, max_tokens=2000)
    difficulty = task.most or 4
    random.seed(1)
    first = task.batch(3, difficulty, seeded())
    random.seed(2)
    state = random.getstate()
    assert torch.equal(first.ids, task.batch(3, difficulty, seeded()).ids)
    assert random.getstate() == state, "Python's random state is unchanged"
    assert first.ids.shape != (other := task.batch(3, difficulty, seeded(1)).ids).shape or not torch.equal(
        first.ids, other
    )


def test_decoded_answers_are_scored_by_reasoning_gym() -> None:
    """In countdown many expressions are correct, and only reasoning-gym's scorer recognises them."""
    task = ReasoningGym(generator="countdown", difficulty_knob="numbers", max_tokens=1000)
    entries = task.entries(3, 4, seeded())
    _, targets, _ = task.encode(entries)
    answers = task.texts(targets, targets)
    assert answers == [entry["answer"] for entry in entries]
    assert task.score_text(answers, entries).tolist() == [1, 1, 1]
    another_way = f"({answers[0]}) + 0 * 1"
    scores = task.score_text([f"({answers[0]})", "1", another_way], entries)
    assert scores[0] == 1 and scores[1:].max() < 1


def test_decoded_texts_stop_at_the_first_end_token() -> None:
    targets = torch.tensor([[UNSCORED, 50, 51, 52, END, UNSCORED]])
    answers = torch.tensor([[99, 50, END, 52, END, 99]])
    assert ReasoningGym().texts(answers, targets) == ["1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generator": "chainsum"}, "reasoning_gym has no generator 'chainsum'; did you mean 'chain_sum'?"),
        ({"difficulty_knob": "term"}, "chain_sum has no knob 'term'; did you mean 'terms'?"),
        ({"settings": {"min_digit": 1}}, "chain_sum has no setting 'min_digit'; did you mean 'min_digits'?"),
        ({"settings": {"seed": 1}}, "settings: seed is drawn for every batch; leave it out"),
        ({"generator": "syllogism", "difficulty_knob": "terms"}, "syllogism has no knob 'terms'"),
    ],
)
def test_unknown_generators_knobs_and_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        tasks.load("reasoning_gym", **options)
    assert message in str(error.value)


def test_the_first_knob_is_the_default_and_is_in_the_options() -> None:
    task = tasks.load("reasoning_gym")
    assert task.unit == "terms" and task.to_dict()["difficulty_knob"] == "terms"
    assert tasks.load("reasoning_gym", generator="syllogism").most == 1, "it has no numeric settings"


def test_difficulties_and_lengths_without_problems_are_refused() -> None:
    with pytest.raises(ValueError, match=r"fails at difficulty=1, .*min_numbers must be greater than 1"):
        ReasoningGym(generator="countdown").batch(2, 1)
    with pytest.raises(ValueError, match=r"0 of 40 chain_sum problems .* into max_tokens=20; raise that"):
        ReasoningGym(max_tokens=20).batch(2, 2)


def test_a_missing_reasoning_gym_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[tasks\]"'):
        tasks.load("reasoning_gym")
