"""``mythos train-gate``."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from typer.testing import CliRunner

from open_mythos import OpenMythos
from open_mythos.cli import app
from open_mythos.training.config import TaskConfig, TrainConfig
from open_mythos.training.runs import save_model, training_config
from open_mythos.training.stopping import SIGNALS

QUICK = ("--steps", 6, "--loops", 3)


def run(*arguments):
    return CliRunner().invoke(app, ["train-gate", *map(str, arguments)])


def flat(result) -> str:
    return " ".join((result.output + result.stderr).split())


def a_run(tmp_path: Path, **changes) -> Path:
    model = tiny_model(halting=False, vocab_size=3)
    cfg = TrainConfig(model=model.cfg, task=TaskConfig(min_difficulty=2, max_difficulty=5), **changes)
    save_model(model, cfg, tmp_path / "run")
    return tmp_path / "run"


def test_a_gated_model_is_saved_beside_the_unchanged_run(tmp_path):
    source = a_run(tmp_path)
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    result = run(source, *QUICK)
    assert result.exit_code == 0, flat(result)
    out = tmp_path / "run-gate"
    made, old = OpenMythos.from_pretrained(out), OpenMythos.from_pretrained(source / "model")
    assert made.cfg.halting and not old.cfg.halting
    for name, x in made.state_dict().items():
        assert torch.equal(x, old.state_dict()[name]) is (".act." not in name), name
    assert before == {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    kept = training_config(out)
    assert kept.gate.steps == 6 and kept.gate.loops == 3 and kept.task.max_difficulty == 5
    text = flat(result)
    assert "2 to 5 bits" in text and "every loop" in text and "3.0" in text and "saves" in text
    assert f"mythos eval {out.resolve()}" in text


def test_a_gate_can_be_trained_on_harder_problems_than_the_model(tmp_path):
    source = a_run(tmp_path)
    result = run(source / "model", *QUICK, "--min-difficulty", 3, "--max-difficulty", 8, "--out", tmp_path / "deep")
    assert result.exit_code == 0, flat(result)
    assert "3 to 8 bits" in flat(result)
    assert training_config(tmp_path / "deep").task.max_difficulty == 5  # still what the model was trained on


def test_the_source_model_is_never_overwritten(tmp_path):
    source = a_run(tmp_path)
    result = run(source, *QUICK, "--out", source / "model")
    assert result.exit_code == 2 and "give another directory" in flat(result)


@pytest.mark.parametrize("number", SIGNALS)
def test_stopping_changes_nothing_and_prints_the_command_to_restart(tmp_path, monkeypatch, number):
    source, out = a_run(tmp_path), tmp_path / "a gate"
    with monkeypatch.context() as patch:
        patch.setattr("open_mythos.training.gate.calibrate", lambda *args: signal.raise_signal(number))
        result = run(source, *QUICK, "--out", out)
    assert result.exit_code == 128 + number and not out.exists()
    (line,) = [line for line in result.stderr.splitlines() if "stopped by" in line]
    said, _, command = line.partition("; nothing was saved; start again with ")
    assert said == f"stopped by {signal.Signals(number).name}"
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert result.exit_code == 0 and training_config(out).gate.steps == 6, flat(result)


def test_stopping_during_the_save_leaves_a_complete_model(tmp_path, monkeypatch):
    save = OpenMythos.save_pretrained
    source = a_run(tmp_path)

    def stopped(*args):
        save(*args)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(OpenMythos, "save_pretrained", stopped)
    result = run(source, *QUICK)
    assert result.exit_code == 143 and f"{tmp_path.resolve()}/run-gate is saved" in flat(result)
    assert training_config(tmp_path / "run-gate").gate.steps == 6


@pytest.mark.parametrize("make, message", [
    (lambda path: path / "nowhere", "is neither a directory nor a shipped model"),
    (lambda path: a_run(path, kind="single"), "this is a baseline"),
])  # fmt: skip
def test_missing_models_and_baselines_are_refused(tmp_path, make, message):
    result = run(make(tmp_path), *QUICK)
    assert result.exit_code == 2 and message in flat(result)


def test_train_gate_appears_in_the_help():
    assert "train-gate" in CliRunner().invoke(app, ["--help"]).output
    assert "--max-difficulty" in run("--help").output
