"""What the subcommands share: where they print, how they fail, how they show numbers and progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

USAGE_ERROR = 2
PREFIXES = ("", "k", "M", "G", "T", "P", "E")

console = Console()
_errors = Console(stderr=True)


def fail(message: str) -> NoReturn:
    """Print one red line to stderr and end the command."""
    _errors.print(Text(f"error: {message}", style="red"), soft_wrap=True)
    raise typer.Exit(USAGE_ERROR)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn what the library raises for a user's mistake into :func:`fail`."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        fail(" ".join(str(error).split()))


def whole_numbers(option: str, text: str, example: str) -> list[int]:
    """What the user gave ``option`` as in ``example``, ``"1,2,4"``; ValueError if it is something else."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} {text!r} should be whole numbers with commas between, as in {example}") from error


def picture(draw: Callable[[], None]) -> bool:
    """Whether ``draw`` could: without matplotlib, a line says what to install."""
    try:
        draw()
    except ImportError as error:
        console.print(f"no picture: {error}", markup=False)
        return False
    return True


def announce(what: str) -> None:
    """A line on a terminal's stderr, above bars that are another library's."""
    if _errors.is_terminal:
        _errors.print(what, style="dim", highlight=False)


@contextmanager
def progress(n_steps: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal's stderr, gone at the end. Call what it hands out as each of ``n_steps`` begins."""
    with Progress(console=_errors, transient=True, disable=not _errors.is_terminal) as bar:
        task = bar.add_task("", total=n_steps)
        begun = 0

        def begin(what: str) -> None:
            nonlocal begun
            bar.update(task, description=what, completed=begun)
            begun += 1

        yield begin


def table(title: str, *columns: str) -> Table:
    """An empty table: its first column to the left, the others, numbers, to the right."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="")
    for i, name in enumerate(columns):
        made.add_column(name, justify="right" if i else "left")
    return made


def si(number: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: ``si(12_345, "B")`` is ``"12.3 kB"``."""
    step = 0
    while abs(number) >= 999.5 and step < len(PREFIXES) - 1:
        number, step = number / 1000, step + 1
    digits = f"{number:.3g}" if step else f"{number:g}"
    return f"{digits} {PREFIXES[step]}{unit}".rstrip()
