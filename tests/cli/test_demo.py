"""`mythos demo` writes a plot, a table and a checkpoint that other commands read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import tiny_model
from typer.testing import CliRunner

from open_mythos import OpenMythos, evaluation, plots
from open_mythos.cli import app
from open_mythos.cli.demo import STEPS
from open_mythos.evaluation.summary import Evaluation
from open_mythos.models import load_model
from open_mythos.training.recipes import recipe


def test_demo_writes_plot_table_and_model(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--steps", "3"])
    assert done.exit_code == 0, done.output
    assert "mythos diagnose" in done.output
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")
    curves = json.loads((tmp_path / "table.json").read_text())
    assert len(curves) == 3 and all(0 <= accuracy <= 1 for curve in curves.values() for accuracy in curve.values())
    assert OpenMythos.from_pretrained(tmp_path).cfg.vocab_size == 3
    assert CliRunner().invoke(app, ["diagnose", str(tmp_path)]).exit_code == 0


def test_demo_evaluates_without_early_exit_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate could hide the harm done by deep loops, or make early exits look like a limit of depth."""
    titles = []
    monkeypatch.setattr(plots, "accuracy_by_loops", lambda *args: titles.append(args[-1]))
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--steps", "1"])
    assert titles == ["mythos demo: accuracy by loops, no early exit"] and "no early exit" in " ".join(
        done.output.split()
    )
    assert not load_model(tmp_path).cfg.halting and Evaluation.load(tmp_path).grids[0].exit is None


def test_demo_steps_default_to_those_of_its_recipe() -> None:
    assert recipe("demo").steps == STEPS


@pytest.mark.parametrize(
    "options", ["--steps 0", "--seed -1", f"--seed {10**20} --pretrained", "--steps 5 --pretrained"]
)
def test_demo_refuses_invalid_options_before_it_writes(tmp_path: Path, options: str) -> None:
    assert CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "run"), *options.split()]).exit_code == 2
    assert not (tmp_path / "run").exists()


def test_demo_does_not_replace_a_models_folder(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "evaluation.json").write_text('{"mine": 1}')
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "model"), "--steps", "1"])
    assert done.exit_code == 2 and "config.json exists and is not of a training run" in " ".join(done.stderr.split())
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


def test_demo_pretrained_solves_384_bits_without_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluated on two problems of each difficulty."""
    whole = evaluation.depth_grid
    monkeypatch.setattr(evaluation, "depth_grid", lambda *what, **more: whole(*what[:4], 2, *what[5:], **more))
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--pretrained"])
    assert done.exit_code == 0, done.output
    curves = json.loads((tmp_path / "table.json").read_text())
    assert list(curves) == ["24 bits (trained)", "96 bits", "384 bits"]
    assert curves["384 bits"]["1"] < 0.6 and curves["384 bits"]["256"] > 0.95
