"""Everything that README.md shows runs."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from open_mythos.cli import COMMANDS, app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_blocks_run(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed
    if difference := re.search(r"tensor\((\S+?)[,)]", printed):
        assert float(difference[1]) < 1e-4  # "rounding only"
    if of_bits := re.findall(r": (\S+) of 384 bits", printed):
        assert float(of_bits[0]) < 0.6 and float(of_bits[-1]) > 0.95


def test_commands_exist() -> None:
    for command in re.findall(r"^mythos ([\w-]+)", README, re.MULTILINE):
        assert command in COMMANDS
    assert CliRunner().invoke(app, ["info", "1b"]).exit_code == 0


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


@pytest.mark.parametrize("name, key", [("claims", "claims"), ("reasoners", "results")])
def test_tables_are_what_was_measured(name: str, key: str) -> None:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    sys.modules[name] = benchmark  # where dataclasses look
    spec.loader.exec_module(benchmark)
    measured = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())[key]
    assert benchmark.markdown(measured) in README
