"""Finding the model of a run, and how it was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import tiny_model
from tiny import tiny_run

from open_mythos.training import runs


def test_a_run_and_its_model_are_found(tmp_path: Path) -> None:
    cfg = tiny_run()
    model = runs.save_model(tiny_model(), cfg, tmp_path)
    assert model == runs.model_dir(tmp_path) == tmp_path / "model"
    assert runs.training_config(str(tmp_path)) == cfg
    assert not runs.load_model(tmp_path).training


def test_a_model_without_training_json_has_no_training_config(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"training.json is missing, so it is not known how .* was trained"):
        runs.training_config(tmp_path)
