"""Every command that reads a model accepts a run, its model directory, or the name of a shipped model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fabricated import fabricate_run
from typer.testing import CliRunner

from open_mythos.cli import app
from open_mythos.evaluation.grid import DepthGrid, depth_grid
from open_mythos.models import load_model, save_model
from open_mythos.report import data

COMMANDS = {
    "info": (),
    "plan": ("--gpus", "1"),
    "diagnose": (),
    "bench": ("--only", "prefill", "--tokens", "8", "--seconds", "0"),
    "eval": ("--difficulties", "8", "--loops", "1", "--examples", "2"),
    "report": ("--difficulty", "4", "--loops", "2"),
    "export": ("exported",),
    "train-gate": ("--steps", "1", "--max-difficulty", "8"),
}


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    fabricate_run(tmp_path / "run")
    monkeypatch.setattr(data, "depth_grid", quick_grid)  # for the shipped model, which has no evaluation
    return tmp_path


def quick_grid(model: Any, task: Any, difficulties: Any, loops: Any, examples: int, **options: Any) -> DepthGrid:
    """Only the two lowest difficulties and the two smallest numbers of loops."""
    return depth_grid(model, task, difficulties[:2], loops[:2], 2, **options)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("source", ["run", "run/model", "parity-tiny"])
def test_commands_accept_a_run_a_model_directory_or_a_shipped_name(there: Path, command: str, source: str) -> None:
    if command == "export":
        pytest.importorskip("transformers")
    done = CliRunner().invoke(app, [command, source, *COMMANDS[command]])
    assert done.exit_code == 0, done.output
    if command == "report":
        page = there / "runs/parity-tiny/report.html" if source == "parity-tiny" else there / "run/report.html"
        assert (source == "parity-tiny") == ('"training":null' in page.read_text().replace(" ", ""))


@pytest.mark.parametrize("source", ["run", "run/model", "text-tiny"])
def test_chat_accepts_a_run_a_model_directory_or_a_shipped_name(there: Path, source: str) -> None:
    save_model(load_model("text-tiny"), there / "run/model", "text-tiny")
    done = CliRunner().invoke(app, ["chat", source, "--max-tokens", "1"], input="hi\n")
    assert done.exit_code == 0, done.output
    assert f"mythos diagnose {source}" in done.output
