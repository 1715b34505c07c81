"""Every recipe is a config that its task accepts; unknown names get a suggestion."""

from __future__ import annotations

import pytest

from open_mythos import tasks
from open_mythos.training.recipes import RECIPES, configured, recipe

NEEDS = {"reasoning_gym": "reasoning_gym"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_task(name: str) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    cfg = recipe(name)
    cfg.validate()
    task = tasks.load(cfg.task.name, **cfg.task.options)
    assert cfg.recipe == name and cfg.model.vocab_size == task.vocab_size
    for difficulty in (cfg.task.min_difficulty, cfg.task.max_difficulty, *cfg.evaluation.difficulties):
        task.check(difficulty)
        assert task.length(difficulty) <= cfg.model.max_seq_len
    assert RECIPES[name].__doc__, "a recipe needs a docstring that tells in one line what it trains"


def test_an_unknown_recipe_suggests_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="unknown recipe 'partiy'; did you mean 'parity'"):
        recipe("partiy")


def test_the_vocabulary_size_follows_the_task_unless_it_is_set() -> None:
    assert configured("chain_sum", ["task.options.modulus=3"]).model.vocab_size < recipe("chain_sum").model.vocab_size
    assert configured("parity", ["model.vocab_size=9"]).model.vocab_size == 9
