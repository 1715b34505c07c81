"""The code, commands and links in README.md and docs work, and tables match the measurements."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from typer.testing import CliRunner

from open_mythos import MythosConfig
from open_mythos.checkpoint import SHIPPED
from open_mythos.cli import COMMANDS, app
from open_mythos.diagnostics import parameters

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [block for page in PAGES for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)]
CHATS = re.findall(r"```\n\$ (mythos chat .*?)```", README.read_text(), re.DOTALL)


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


@pytest.mark.parametrize("chat", CHATS)
def test_chat_examples_show_the_actual_output(chat: str) -> None:
    command, *lines = chat.splitlines()
    said = [line.removeprefix("> ") for line in lines if line.startswith("> ")]
    done = CliRunner().invoke(app, shlex.split(command)[1:], input="\n".join(said))
    assert done.exit_code == 0
    answers = done.output.splitlines()[1:-1]  # between the greeting and what to do next
    assert list(map(words_of, answers)) == [words_of(line) for line in lines if not line.startswith("> ")]


def words_of(line: str) -> str:
    """A line without its probabilities, which vary with rounding."""
    return re.sub(r"1?\.\d\d", "p", line).rstrip()


def test_no_text_installs_the_other_package_of_this_name() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    sources = {path: path.read_text() for path in (ROOT / "open_mythos").rglob("*.py")}
    for path, text in {**sources, **{page: page.read_text() for page in PAGES}}.items():
        assert not re.search(r"pip install [^#\n]*open[-_]mythos", text), path
        for extra in re.findall(r"pip install \"\.\[(\w+)\]|missing\([^)]*\"(\w+)\"\)", text):
            assert "".join(extra) in extras, (path, extra)


def test_mentioned_commands_exist() -> None:
    for page in PAGES:
        for command in re.findall(r"(?:^|`|\.venv/bin/)mythos ([a-z][a-z-]*)", page.read_text(), re.MULTILINE):
            assert command in COMMANDS, (page, command)
    assert CliRunner().invoke(app, ["info", "1b"]).exit_code == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("name, key, table, page", [
    ("claims", "claims", "markdown", "docs/tutorials.md"), ("reasoners", "results", "markdown", "docs/results.md"),
    ("reasoners", "results", "summary", "README.md"), ("retrofit", "results", "markdown", "docs/retrofit.md"),
    ("retrofit", "again", "again_markdown", "docs/retrofit.md"),
    ("language", "results", "markdown", "docs/language.md"), ("words", "results", "markdown", "docs/concepts/data.md"),
    ("bridge", "results", "markdown", "docs/retrofit.md"),
])  # fmt: skip
def test_tables_match_the_measurements(name: str, key: str, table: str, page: str) -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())[key]
    assert getattr(import_module(name), table)(measured) in (ROOT / page).read_text()


def test_the_readme_is_short_and_its_figures_are_those_of_the_model() -> None:
    text = README.read_text()
    assert len(text.splitlines()) < 150
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code.splitlines()) <= 20
    cfg = MythosConfig.load(SHIPPED / "parity-tiny" / "config.json")
    assert f"{parameters(cfg).total // 1000} thousand parameters" in text
    figures = json.loads((SHIPPED / "parity-tiny" / "figures.json").read_text())
    said = re.findall(r"(\d+)(?: bits)? at (\d+)", text.split("## Start")[0])
    assert said == [("96", "32"), ("384", "128")]
    for bits, loops in said:
        row = figures["accuracy"][figures["difficulties"].index(int(bits))]
        at = figures["loops"].index(int(loops))
        assert row[at] > 0.999 > row[at - 1], "solved at this number of loops, but not at half as many"


def test_table_headers_use_terms_of_the_field() -> None:
    """Column headers contain no shorthand that would need an explanation."""
    shorthand = r"\b(asked|least|greatest|loud|settled)\b|\(most\)"
    for page in PAGES:
        for head in re.findall(r"^(\|.*\|)\n\|---", page.read_text(), re.MULTILINE):
            assert not re.search(shorthand, head), (page, head)
