"""The notebooks run from top to bottom and support the claims in their text; committed outputs come from a run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import execute
import nbformat
import pytest

HERE = Path(execute.__file__).parent
NAMES = ("parity", "chain_sum")
# Run after the last cell: the claims of the text, with a margin for rounding on other machines.
CLAIMS = {
    "parity": """
seen_24 = curves["24 bits"]
assert seen_24[1] + 0.05 < seen_24[3] and seen_24[3] + 0.02 < seen_24[8] > 0.95, seen_24
assert used.mean() < 14 and used[:, 0].mean() < used[:, -1].mean(), used.mean(0)
assert share.min() > 0.1, share
ranks = used.mean(0).argsort().argsort().float()
assert torch.corrcoef(torch.stack([ranks, torch.arange(24.0)]))[0, 1] >= 0.5, used.mean(0)
model.cfg.halting = False
assert seen_24[16] >= accuracy(24, 16) - 0.005, seen_24
assert grid.accuracy[2, -1] > 0.99 and grid.accuracy[2, 0] < 0.6, grid.accuracy
""",
    "chain_sum": """
assert curves["3 digits"][1] + 0.03 < curves["3 digits"][4] > 0.5, curves
assert share.min() > 0.08 and 0 < decay.min() and decay.max() < 1, (share, decay)
assert grid.accuracy[3, -1] > 0.95 and grid.accuracy[3, 0] < 0.5, grid.accuracy
""",
}


def test_every_notebook_has_claims_to_check() -> None:
    assert {path.stem for path in HERE.glob("*.ipynb")} == set(NAMES) == set(CLAIMS)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_and_its_claims_hold(name: str, tmp_path: Path) -> None:
    notebook = execute.execute(HERE / f"{name}.ipynb", tmp_path, CLAIMS[name])
    assert pictures(notebook) >= 4
    assert not list(tmp_path.iterdir()), "a notebook writes no files to its working directory"


@pytest.mark.parametrize("name", NAMES)
def test_committed_notebooks_were_run_in_order_and_contain_no_local_path(name: str) -> None:
    path = HERE / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert pictures(notebook) >= 4 and path.stat().st_size < 500_000
    assert not re.search(r"/(home|root|work|tmp|Users)/", path.read_text())
    assert notebook.cells[0].cell_type == "markdown" and "%pip install" in notebook.cells[1].source
    assert all(imports_nothing_of_examples(cell.source) for cell in code)


def pictures(notebook: nbformat.NotebookNode) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def imports_nothing_of_examples(source: str) -> bool:
    tree = ast.parse(re.sub(r"%pip .*", "pass", source))
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return not names & {"examples", "parity", "chain_sum"}
