"""Run notebooks from top to bottom and keep what they print and draw.

    python notebooks/execute.py [notebooks/*.ipynb]

The test suite runs them the same way, and fails where one does. Needs the ``notebooks`` extra.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).parent


def execute(path: Path, where: Path, *more: str) -> NotebookNode:
    """A notebook after it was run in the directory ``where``, one cell after the other; it must not fail.

    Args:
        path: of the notebook, which is left as it is.
        where: directory to run in.
        more: code to run after its last cell, which is not kept.
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
