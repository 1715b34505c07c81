"""The model's source as flat modules with relative imports, for transformers to load without this package."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

from open_mythos import files

_ROOTS = [f"open_mythos.integrations.hf.{kind}_open_mythos" for kind in ("configuration", "modeling")]
_IMPORT = re.compile(r"^(\s*)from (open_mythos(?:\.\w+)*) import (.*)$", re.MULTILINE)


def write(directory: str | Path) -> None:
    """Write :func:`needed` into ``directory``."""
    sources = needed()
    for name, source in sources.items():
        text = _IMPORT.sub(lambda found: _rewritten(found, sources), source)
        files.write(Path(directory, f"{_flat(name)}.py"), text)


@cache
def needed() -> dict[str, str]:
    """Source code by module name: config and models, and all modules of this package that they import."""
    sources: dict[str, str] = {}
    waiting = list(_ROOTS)
    while waiting:
        name = waiting.pop()
        if name in sources:
            continue
        path = _path(name)
        assert path is not None, f"{name} is a module of this package"
        sources[name] = path.read_text()
        for node in ast.parse(sources[name]).body:
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("open_mythos"):
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
                waiting += [module for module in modules if _path(module)] or [node.module]
    return sources


def _path(module: str) -> Path | None:
    path = Path(__file__).parents[2].joinpath(*module.split(".")[1:])
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _rewritten(found: re.Match[str], sources: dict[str, str]) -> str:
    indent, module, names = found.groups()
    modules = {name: f"{module}.{name}" for name in names.split(", ")}
    if set(modules.values()) <= sources.keys():
        lines = []
        for name, flat in zip(modules, map(_flat, modules.values()), strict=True):
            # transformers copies only modules that are named right after the dot
            lines += [f"{indent}from .{flat} import __name__ as _", f"{indent}from . import {flat} as {name}"]
        return "\n".join(lines)
    return f"{indent}from .{_flat(module)} import {names}" if module in sources else found[0]


def _flat(module: str) -> str:
    """``open_mythos.nn.gqa`` as ``open_mythos_nn_gqa``; the two that transformers loads keep their last name."""
    return module.rpartition(".")[2] if module in _ROOTS else module.replace(".", "_")
