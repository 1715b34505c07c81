"""The site builds without a warning, from pages, docstrings, commands and notebooks, and links resolve."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from open_mythos.cli import COMMANDS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_the_site_has_every_page_the_api_and_all_commands(site: Path) -> None:
    assert (site / "index.html").is_file() and (site / "concepts" / "loops" / "index.html").is_file()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.stem == "index" or f"{page.stem}/" in (site / "index.html").read_text(), f"{page} not in the menu"
    api = (site / "api" / "model" / "index.html").read_text()
    assert 'id="open_mythos.model.OpenMythos.generate"' in api and "n_loops" in api
    cli = (site / "cli" / "index.html").read_text()
    assert all(f"mythos {name}" in cli for name in COMMANDS) and "--dry-run" in cli


def test_notebook_pages_have_figures(site: Path) -> None:
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        page = (site / "notebooks" / notebook.stem / "index.html").read_text()
        assert page.count("data:image/png;base64,") >= 4


def test_pages_have_no_sphinx_roles_and_load_nothing_from_other_hosts(site: Path) -> None:
    for page in site.rglob("*.html"):
        html = page.read_text()
        text = re.sub(r"<pre.*?</pre>", "", html, flags=re.DOTALL)
        assert not re.findall(r":(?:class|func|meth|mod|data|attr):", text), page
        assert not re.findall(r'<(?:script|link)[^>]+(?:src|href)="https?://', html), f"{page} loads from another host"


def test_the_architecture_page_lists_the_existing_files() -> None:
    text = (ROOT / "docs" / "concepts" / "architecture.md").read_text()
    package = ROOT / "open_mythos"
    table = {
        path for row in re.findall(r"^\|.*\|$", text, re.MULTILINE) for path in re.findall(r"`([\w/]+(?:\.py|/))`", row)
    }
    short = {"trainer.py", "objective.py", "recipes.py", "gate.py", "fit.py", "distributed.py"}
    for path in table:
        assert (package / "training" / path if path in short else package / path).exists(), path
    core = [
        *package.glob("*.py"),
        *(path for part in ("ops", "nn", "generation") for path in (package / part).glob("*.py")),
    ]
    aside = {"install.py", "main.py"}  # hints in error messages, and names of the reference
    for path in core:
        name = str(path.relative_to(package))
        assert path.stem.startswith("__") or name in table | aside, f"{name} is not in the table"


def test_every_test_named_on_the_reliability_page_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "reliability.md").read_text())
    assert len(named) > 15
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"
