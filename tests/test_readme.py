"""The code, commands and links in README.md and the pages of docs work, and tables are what was measured."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from open_mythos.cli import COMMANDS, app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [block for page in PAGES for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT uses an old name of transformers
@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_run(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed
    if difference := re.search(r"tensor\((\S+?)[,)]", printed):
        assert float(difference[1]) < 1e-4  # "rounding only"
    if of_bits := re.findall(r": (\S+) of 384 bits", printed):
        assert float(of_bits[0]) < 0.6 and float(of_bits[-1]) > 0.95


def test_no_text_installs_the_other_project_of_this_name() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    sources = {path: path.read_text() for path in (ROOT / "open_mythos").rglob("*.py")}
    for path, text in {**sources, **{page: page.read_text() for page in PAGES}}.items():
        assert not re.search(r"pip install [^#\n]*open[-_]mythos", text), path
        for extra in re.findall(r"pip install \"\.\[(\w+)\]|missing\([^)]*\"(\w+)\"\)", text):
            assert "".join(extra) in extras, (path, extra)


def test_commands_exist() -> None:
    for page in PAGES:
        for command in re.findall(r"^mythos ([\w-]+)", page.read_text(), re.MULTILINE):
            assert command in COMMANDS
    assert CliRunner().invoke(app, ["info", "1b"]).exit_code == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("name, key, page", [
    ("claims", "claims", "README.md"), ("reasoners", "results", "README.md"),
    ("retrofit", "results", "docs/retrofit.md"),
])  # fmt: skip
def test_tables_are_what_was_measured(name: str, key: str, page: str) -> None:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    sys.modules[name] = benchmark  # where dataclasses look
    spec.loader.exec_module(benchmark)
    measured = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())[key]
    assert benchmark.markdown(measured) in (ROOT / page).read_text()
