"""Everything that README.md shows runs."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from open_mythos.cli import COMMANDS, app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_blocks_run(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "README.md", "exec"), {})
    difference = re.search(r"tensor\((\S+?)[,)]", capsys.readouterr().out)
    assert difference is not None and float(difference[1]) < 1e-4


def test_commands_exist() -> None:
    for command in re.findall(r"^mythos (\w+)", README, re.MULTILINE):
        assert command in COMMANDS
    assert CliRunner().invoke(app, ["info", "1b"]).exit_code == 0


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_claims_table_is_what_was_measured() -> None:
    spec = importlib.util.spec_from_file_location("claims", ROOT / "benchmarks" / "claims.py")
    assert spec is not None and spec.loader is not None
    claims = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(claims)
    measured = json.loads((ROOT / "benchmarks" / "results" / "claims.json").read_text())["claims"]
    assert claims.markdown(measured) in README
