"""Layers import in one direction, and optional packages are imported only where needed; checked on the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import open_mythos

ROOT = Path(open_mythos.__file__).parent
FACADES = {"__init__.py", "__main__.py", "main.py"}
LAYERS = [
    {"files", "install"},
    {"fields", "weights"},
    {"config"},
    {"ops"},
    {"arguments"},
    {"variants", "cache", "tasks", "plots"},
    {"dict_cache", "inputs"},
    {"context"},
    {"interface", "nn"},
    {"checkpoint", "generation", "quantization"},
    {"model"},
    {"models", "reference", "seq2seq", "diagnostics"},
    {"evaluation"},
    {"training"},
    {"planning"},
    {"integrations"},
    {"report"},
    {"cli"},
]
EVERYWHERE = {"torch", "numpy", "safetensors"} | sys.stdlib_module_names
# By file or folder: the package whose classes it subclasses. The file itself is imported only where it is used.
OPTIONAL = {"quantization/weights.py": {"torchao"}, "integrations/hf": {"transformers"}}
# A registry imports an entry when it is chosen, inside a function; the entries may import the registry.
REGISTRIES = {"generation/engines.py"}
FILES = sorted(path for path in ROOT.rglob("*.py") if str(path.relative_to(ROOT)) not in FACADES)
MODULES = {".".join(("open_mythos", *path.relative_to(ROOT).with_suffix("").parts)): path for path in FILES}
MODULES = {name.removesuffix(".__init__"): path for name, path in MODULES.items()}


def is_type_checking(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported(nodes, everywhere=False):
    """Dotted names that these statements import at import time; ``everywhere``: also for types, and in functions."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if node.module == "open_mythos" or name in MODULES else node.module for name in inside)
        elif everywhere:
            yield from imported(ast.iter_child_nodes(node), everywhere)
        elif not isinstance(node, ast.FunctionDef | ast.ClassDef):
            for block in ("body", "orelse", "handlers", "finalbody")[is_type_checking(node) :]:
                yield from imported(getattr(node, block, []))


def inside(path):
    """Names in this package that a file imports anywhere."""
    names = imported(ast.parse(path.read_text()).body, path.relative_to(ROOT).as_posix() not in REGISTRIES)
    return {name for name in names if name.split(".")[0] == "open_mythos"} - {"open_mythos.__version__"}


def circle(edges):
    """The names of one cycle in a graph; empty if there is none."""
    done = set()

    def search(name, trail):
        if name in trail:
            return trail[trail.index(name) :]
        if name not in done:
            for other in sorted(edges.get(name, ())):
                if found := search(other, [*trail, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in sorted(edges) if (found := search(name, []))), [])


def part_of(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def layer_of(part):
    found = [i for i, parts in enumerate(LAYERS) if part in parts]
    assert found, f"{part} has no place in LAYERS"
    return found[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_only_to_lower_layers(path):
    part, place = part_of(path), path.relative_to(ROOT)
    allowed = EVERYWHERE | ({"typer", "rich"} if part == "cli" else set())
    allowed = allowed.union(*(OPTIONAL.get(part.as_posix(), set()) for part in (place, *place.parents)))
    for name in imported(ast.parse(path.read_text()).body):
        assert name.split(".")[0] in allowed | {"open_mythos"}, f"{path.name} imports {name} at module level"
    for name in inside(path):
        other = name.split(".")[1]
        assert other != "main", f"{path.name} imports the façade open_mythos.main"
        assert other == part or layer_of(other) < layer_of(part), f"{path.name} imports {name}, not in a lower layer"


def test_there_are_no_circular_imports():
    edges = {name: {other for other in inside(path) if other in MODULES} - {name} for name, path in MODULES.items()}
    assert len(edges) > 80 and sum(map(len, edges.values())) > 200
    assert not circle(edges), " -> ".join(circle(edges))


def test_these_checks_detect_imports_and_cycles():
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
    with e:
        from open_mythos.nn import halting, Other
"""
    at_once = ["torch", "b", "open_mythos.nn", "c"]
    assert list(imported(ast.parse(source).body)) == at_once
    everywhere = sorted([*at_once, "a", "d", "open_mythos.nn.halting", "open_mythos.nn"])
    assert sorted(imported(ast.parse(source).body, everywhere=True)) == everywhere
    assert circle({"a": {"b", "x"}, "b": {"c"}, "c": {"b"}, "x": set()}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []


def test_importing_the_package_is_fast_and_provides_all_names():
    code = (
        "import sys, open_mythos, open_mythos.cli\n"
        "assert not {'torch', 'matplotlib', 'transformers'} & set(sys.modules)\n"
        "assert set(open_mythos.__all__) <= set(dir(open_mythos))\n"
        "for name in open_mythos.__all__: getattr(open_mythos, name)\n"
        "from open_mythos import *\n"
        "import torch\n"
        "assert OpenMythos is open_mythos.model.OpenMythos\n"
        "assert callable(trace) and callable(open_mythos.diagnostics.trace)\n"
        "assert not hasattr(open_mythos, 'nonsense') and 'transformers' not in sys.modules\n"
        "OpenMythos.from_pretrained('parity-tiny').generate(torch.ones(1, 2, dtype=torch.long), 1)\n"
        "assert 'torch._dynamo' not in sys.modules, 'torch imports its compiler, which takes a second'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
