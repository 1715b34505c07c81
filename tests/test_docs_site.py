"""The site builds without a warning, from pages, docstrings, commands and notebooks, and links lead somewhere."""

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


def test_there_is_a_page_of_everything(site: Path) -> None:
    assert (site / "index.html").is_file() and (site / "concepts" / "loops" / "index.html").is_file()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.stem == "index" or f"{page.stem}/" in (site / "index.html").read_text(), f"{page} is in no menu"
    api = (site / "api" / "model" / "index.html").read_text()
    assert 'id="open_mythos.model.OpenMythos.generate"' in api and "n_loops" in api
    cli = (site / "cli" / "index.html").read_text()
    assert all(f"mythos {name}" in cli for name in COMMANDS) and "--dry-run" in cli


def test_notebooks_are_there_with_their_figures(site: Path) -> None:
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        page = (site / "notebooks" / notebook.stem / "index.html").read_text()
        assert page.count("data:image/png;base64,") >= 4


def test_no_sphinx_roles_and_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        html = page.read_text()
        text = re.sub(r"<pre.*?</pre>", "", html, flags=re.DOTALL)
        assert not re.findall(r":(?:class|func|meth|mod|data|attr):", text), page
        assert not re.findall(r'<(?:script|link)[^>]+(?:src|href)="https?://', html), f"{page} fetches from elsewhere"
