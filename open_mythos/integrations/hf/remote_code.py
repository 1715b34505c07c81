"""The model's source as a folder of flat modules, which transformers can load where this package is not installed.

transformers copies what stands beside a model's module and is imported relatively, in one flat folder. So every module
of the package that the model imports is written there under a flat name, with its imports rewritten, and nothing else
changed.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

_ROOTS = (
    "open_mythos.integrations.hf.configuration_open_mythos",
    "open_mythos.integrations.hf.modeling_open_mythos",
)
_IMPORT = re.compile(r"^(\s*)from (open_mythos(?:\.\w+)*) import (.*)$", re.MULTILINE)


def write(directory: str | Path) -> None:
    """Write the source of config and models into ``directory``."""
    sources = _gather()
    for name, source in sources.items():
        text = _IMPORT.sub(lambda found: _rewritten(found, sources), source)
        (Path(directory) / f"{_flat(name)}.py").write_text(text)


def _gather() -> dict[str, str]:
    """The sources of all modules that the models need as they are imported, by dotted name."""
    sources: dict[str, str] = {}
    waiting = list(_ROOTS)
    while waiting:
        name = waiting.pop()
        if name in sources:
            continue
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None, f"{name} is a module of this package"
        sources[name] = Path(spec.origin).read_text()
        for node in ast.parse(sources[name]).body:
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("open_mythos"):
                waiting += [node.module] if node.module != "open_mythos" else _parts(node)
    return sources


def _parts(node: ast.ImportFrom) -> list[str]:
    return [f"open_mythos.{alias.name}" for alias in node.names]


def _rewritten(found: re.Match[str], sources: dict[str, str]) -> str:
    indent, module, names = found.groups()
    if module == "open_mythos":  # modules, each of which has another name now
        names = [name.strip() for name in names.split(",")]
        return "\n".join(f"{indent}from . import {_flat(f'open_mythos.{name}')} as {name}" for name in names)
    return f"{indent}from .{_flat(module)} import {names}" if module in sources else found[0]


def _flat(module: str) -> str:
    """``open_mythos.nn.gqa`` as ``open_mythos_nn_gqa``; the two that transformers asks for keep their last names."""
    return module.rpartition(".")[2] if module in _ROOTS else module.replace(".", "_")
