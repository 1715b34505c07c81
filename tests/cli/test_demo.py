"""`mythos demo` leaves a picture, a table and a checkpoint that the next command reads."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from open_mythos import OpenMythos
from open_mythos.cli import app


def test_demo_leaves_what_it_says(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--steps", "3"])
    assert done.exit_code == 0, done.output
    assert "mythos diagnose" in done.output
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")
    curves = json.loads((tmp_path / "table.json").read_text())
    assert len(curves) == 3 and all(0 <= accuracy <= 1 for curve in curves.values() for accuracy in curve.values())
    assert OpenMythos.from_pretrained(tmp_path).cfg.vocab_size == 3
    assert CliRunner().invoke(app, ["diagnose", str(tmp_path)]).exit_code == 0


def test_demo_refuses_no_steps(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--steps", "0"]).exit_code == 2


def test_demo_of_the_shipped_model_trains_nothing_and_solves_384_bits(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--pretrained"])
    assert done.exit_code == 0, done.output
    curves = json.loads((tmp_path / "table.json").read_text())
    assert list(curves) == ["24 bits (trained)", "96 bits", "384 bits"]
    assert curves["384 bits"]["1"] < 0.6 and curves["384 bits"]["256"] > 0.95
