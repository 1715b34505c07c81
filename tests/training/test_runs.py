"""A model is found by its run, its directory or its name."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import tiny_model
from tiny import tiny_run

from open_mythos import checkpoint
from open_mythos.training import runs


def test_a_run_and_its_model_are_found(tmp_path: Path) -> None:
    cfg = tiny_run()
    model = runs.save_model(tiny_model(), cfg, tmp_path)
    assert runs.model_dir(tmp_path) == runs.model_dir(model) == model == tmp_path / "model"
    assert runs.training_config(str(tmp_path)) == cfg
    assert not runs.load_model(tmp_path).training


def test_any_saved_model_is_found_but_nothing_says_how_it_was_trained(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    assert runs.model_dir(tmp_path) == tmp_path
    assert runs.load_model(tmp_path).cfg.dim == 32
    with pytest.raises(ValueError, match=r"training.json is missing, so nothing says how .* was trained"):
        runs.training_config(tmp_path)


def test_a_shipped_model_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "SHIPPED", tmp_path)
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path)
    tiny_model().save_pretrained(tmp_path / "parity-tiny")
    assert runs.model_dir("parity-tiny") == tmp_path / "parity-tiny"
    with pytest.raises(ValueError, match="'parity-tiny'"):
        runs.model_dir("parity-tniy")


def test_errors_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no run and no model"):
        runs.model_dir(tmp_path)
    tiny_run().save(tmp_path / "config.json")
    with pytest.raises(ValueError, match="the run has not ended; go on with --resume auto"):
        runs.model_dir(tmp_path)
    with pytest.raises(ValueError, match=r"a/b is no directory and no shipped .* hf download a/b --local-dir FOLDER"):
        runs.model_dir("a/b")
    with pytest.raises(ValueError, match="nowhere is no directory"):
        runs.model_dir("nowhere")
