"""Run notebooks from top to bottom and save their output in them.

    python notebooks/execute.py [notebooks/*.ipynb]

The test suite runs them in the same way, and fails if a notebook fails. Needs the extra ``notebooks``.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).parent


def execute(path: Path, where: Path, *more: str) -> NotebookNode:
    """Run a notebook in the directory ``where``, cell by cell, and return it with its output.

    Args:
        path: the notebook's file, which is not changed.
        where: the directory to run in.
        more: code to run after the last cell; it is not part of the result.

    Raises:
        CellExecutionError: of nbclient, if a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    kept = len(notebook.cells)
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in more]
    NotebookClient(
        notebook, timeout=300, record_timing=False, coalesce_streams=True, resources={"metadata": {"path": str(where)}}
    ).execute()
    notebook.cells = notebook.cells[:kept]
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def main() -> None:
    for path in map(Path, sys.argv[1:] or sorted(HERE.glob("*.ipynb"))):
        nbformat.write(execute(path, path.parent), path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
