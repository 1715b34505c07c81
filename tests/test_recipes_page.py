"""docs/recipes.md: the table matches the estimates, and the commands run."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import recipes
from typer.testing import CliRunner

from open_mythos.cli import app
from open_mythos.diagnostics import parameters
from open_mythos.training import cost
from open_mythos.training.recipes import configured

PAGE = recipes.PAGE.read_text()
RESULTS: dict[str, Any] = json.loads((recipes.ROOT / "benchmarks" / "results" / "recipes.json").read_text())["results"]
SMALL = [
    "model.dim=192", "model.expert_dim=8", "batch_size=1", "accumulate=1", "task.min_difficulty=8",
    "task.max_difficulty=8", "evaluation.difficulties=8",
]  # fmt: skip


def test_the_table_matches_the_estimates_which_fit_12_gb() -> None:
    assert recipes.markdown(RESULTS) in PAGE
    for recipe in recipes.RECIPES:
        assert float(recipes.line(recipe, RESULTS[recipe.name])[8].strip("*")) < 9


@pytest.mark.parametrize("recipe", recipes.RECIPES, ids=lambda recipe: recipe.name)
def test_the_command_of_each_recipe_runs(recipe: recipes.Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overrides make the model narrow, the rows short and the batch one row, since the full size needs a GPU."""
    monkeypatch.setattr(cost, "_TRIAL_STEPS", 1)
    assert recipe.command in PAGE
    words = recipe.command.replace("\\\n", " ").split()[1:]
    cfg = configured("text", recipe.assignments)
    assert cfg.task.max_difficulty <= cfg.model.max_seq_len and cfg.evaluation.difficulties == [cfg.task.max_difficulty]
    changed = {word.partition("=")[0] for word in SMALL}
    done = CliRunner().invoke(
        app, [*(word for word in words if word.partition("=")[0] not in changed), *SMALL, "--dry-run"]
    )
    assert done.exit_code == 0, done.output
    assert RESULTS[recipe.name]["parameters"] == parameters(cfg.model).total


def test_the_estimated_memory_grows_with_the_batch_size() -> None:
    small = recipes.Recipe("tiny", "", ("model.dim=16 batch_size=4", recipes.context(16)))
    found = recipes.estimate(small)
    counted = configured("text", small.assignments)
    weights, four = recipes.of_rows(counted, 4)
    assert weights == found["weights"] == pytest.approx(5 * 4 * found["parameters"], rel=0.01)
    assert found["anyway"] + 4 * found["a_row"] == pytest.approx(four, rel=0.05)


@pytest.mark.parametrize("command", re.findall(r"^mythos train debug .*?$", PAGE, re.MULTILINE))
def test_mentioned_loggers_exist(command: str) -> None:
    from open_mythos.training.loggers import LOGGERS

    (name,) = re.findall(r"loggers=(\w+)", command)
    assert name in LOGGERS
