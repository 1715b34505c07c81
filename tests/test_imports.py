"""Imports flow one way, and only what needs an optional package imports it. Read from the source, nothing is run."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import open_mythos

ROOT = Path(open_mythos.__file__).parent
FACADES = {"__init__.py", "__main__.py", "main.py"}
LAYERS = [
    {"fields", "install"},
    {"config", "native"},
    {"variants", "cache", "ops", "tasks", "plots"},
    {"nn"},
    {"checkpoint", "generation", "quantization"},
    {"model"},
    {"reference", "diagnostics", "models"},
    {"evaluation"},
    {"training"},
    {"integrations"},
    {"report"},
    {"cli"},
]
EVERYWHERE = {"torch", "numpy", "safetensors"} | sys.stdlib_module_names
# By file or folder: what its classes are made of. Itself, it is imported where it is used.
OPTIONAL = {"quantization/weights.py": {"torchao"}, "integrations/hf": {"transformers"}}
FILES = sorted(path for path in ROOT.rglob("*.py") if str(path.relative_to(ROOT)) not in FACADES)


def is_type_checking(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported(body):
    """Dotted names that these statements import, ``if TYPE_CHECKING`` and functions left out."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "open_mythos":
                yield from (f"open_mythos.{alias.name}" for alias in node.names)
            else:
                yield node.module
        elif not isinstance(node, ast.FunctionDef | ast.ClassDef):
            for block in ("body", "orelse", "handlers", "finalbody")[is_type_checking(node) :]:
                yield from imported(getattr(node, block, []))


def part_of(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def layer_of(part):
    found = [i for i, parts in enumerate(LAYERS) if part in parts]
    assert found, f"{part} has no place in LAYERS"
    return found[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_dependency_direction(path):
    part = part_of(path)
    for name in imported(ast.parse(path.read_text()).body):
        if name.split(".")[0] != "open_mythos":
            allowed = EVERYWHERE | ({"typer", "rich"} if part == "cli" else set())
            place = path.relative_to(ROOT)
            allowed = allowed.union(*(OPTIONAL.get(part.as_posix(), set()) for part in (place, *place.parents)))
            assert name.split(".")[0] in allowed, f"{path.name} imports {name} at module level"
            continue
        other = name.split(".")[1]
        if other == "__version__":
            continue
        assert other != "main", f"{path.name} imports the façade open_mythos.main"
        assert other == part or layer_of(other) < layer_of(part), f"{path.name} imports {name}, which is above it"


def test_the_test_sees_a_wrong_import():
    source = """
import torch
if TYPE_CHECKING:
    import a
else:
    import b
try:
    from open_mythos import nn
except ImportError:
    import c
def f():
    import d
"""
    assert list(imported(ast.parse(source).body)) == ["torch", "b", "open_mythos.nn", "c"]


def test_importing_the_package_is_light_and_its_names_are_all_there():
    code = (
        "import sys, open_mythos, open_mythos.cli\n"
        "assert not {'torch', 'matplotlib', 'transformers'} & set(sys.modules)\n"
        "assert set(open_mythos.__all__) <= set(dir(open_mythos))\n"
        "for name in open_mythos.__all__: getattr(open_mythos, name)\n"
        "from open_mythos import *\n"
        "assert OpenMythos is open_mythos.model.OpenMythos\n"
        "assert callable(trace) and callable(open_mythos.diagnostics.trace)\n"
        "assert not hasattr(open_mythos, 'nonsense') and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
