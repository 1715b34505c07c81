"""Synthetic tasks with a numeric difficulty, for training and evaluation."""

import dataclasses
from importlib import import_module
from typing import Any

from open_mythos.arguments import checked
from open_mythos.fields import nearest
from open_mythos.tasks.base import UNSCORED, Batch, Score, Task, pad

__all__ = ["NAMES", "UNSCORED", "Batch", "Score", "Task", "load", "pad"]

NAMES = (
    "parity", "prefix_sums", "chain_sum", "p_hop", "addition", "permutations", "maze", "mini_sudoku",
    "assignments", "word_problems", "relations", "registers", "words", "reasoning_gym", "text",
)  # fmt: skip
"""Names that :func:`load` accepts. Each is a module of this package, with a class of the same name in CamelCase."""


@checked
def load(name: str, **options: Any) -> Task:
    """Make a task.

    Args:
        name: one of ``NAMES``.
        options: fields of the task's class.

    Raises:
        ValueError: for an unknown name (with the nearest known one), an unknown option, or an invalid value.
        ImportError: naming the extra to install, if the task needs a package that is not installed.
    """
    known = options_of(name)
    for option in options:
        if option not in known:
            has = f"has {', '.join(known)}" if known else "has none"
            raise ValueError(f"{name} has no option {option!r} (task.options.{option}); it {has}")
    return _kind(name)(**options)


def options_of(name: str) -> list[str]:
    """The options of a task; ValueError for an unknown name."""
    return [field.name for field in dataclasses.fields(_kind(name))]


def _kind(name: str) -> Any:
    if name not in NAMES:
        raise ValueError(f"unknown task {name!r}; {nearest(name, NAMES)}")
    return getattr(import_module(f"open_mythos.tasks.{name}"), name.title().replace("_", ""))
