"""Shared output helpers of the subcommands: messages, errors, tables, numbers, progress bars.

Text may come from files and users, so it is never interpreted as markup.
"""

import itertools
import math
import os
import re
import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import NoReturn

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from open_mythos.fields import must

SILENCE = 5.0  # seconds between progress lines where no bar is shown

console = Console(markup=False, emoji=False, highlight=False)
_errors = Console(stderr=True, markup=False, emoji=False, highlight=False)
_TO_TYPE = "\ue000", "\ue001"  # mark the start and end of a command to type, which is printed bold


def fail(message: str, everywhere: bool = False) -> NoReturn:
    """Print one red line to stderr, from a machine's first process or from all if ``everywhere``; exit with code 2."""
    # Only torchrun sets LOCAL_RANK; under other schedulers, each process has its own log.
    if everywhere or os.environ.get("LOCAL_RANK", "0") == "0":
        _errors.print(Text(f"error: {message}", style="red"), soft_wrap=True)
    raise typer.Exit(2)


def note(*lines: str) -> None:
    """Print lines without wrapping, with the results of :func:`mythos` in bold."""
    before, *parts = re.split("(?=\ue000)|\ue001", "\n".join(lines))
    bold = ((part.removeprefix(_TO_TYPE[0]), "bold" if part[:1] == _TO_TYPE[0] else "") for part in parts)
    console.print(Text.assemble(before, *bold), soft_wrap=True)


def mythos(*words: object) -> str:
    """A ``mythos`` command to type next, for :func:`note`; quoted for a shell."""
    return typed(*words).join(_TO_TYPE)


def typed(*words: object) -> str:
    """A ``mythos`` command as plain text, quoted for a shell."""
    return shlex.join(["mythos", *map(str, words)])


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn the library's errors for invalid input into :func:`fail`."""
    try:
        yield
    except OSError as error:
        known = error.strerror and error.filename
        fail(f"{error.filename}: {error.strerror}" if known else " ".join(str(error).split()))
    except (ValueError, ImportError) as error:
        fail(" ".join(str(error).split()))
    except (MemoryError, RuntimeError) as error:
        from open_mythos.training.allocator import is_full

        if not is_full(error):
            raise
        reason = str(error).partition("\n")[0] or "for this command"
        fail(f"out of memory ({reason}); use smaller sizes, or free some memory")


def whole_numbers(option: str, text: str, example: str) -> list[int]:
    """Parse the comma-separated integers of ``option``; ValueError, with an example, for anything else."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} {text!r} should be whole numbers separated by commas, as in {example}") from error


def numbers(option: str, text: str, example: str) -> list[float]:
    """As :func:`whole_numbers`, for positive numbers of any kind."""
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = []
    must(
        bool(found) and all(0 < number < math.inf for number in found),
        f"{option} {text!r} should be positive numbers separated by commas, as in {example}",
    )
    return found


def picture(draw: Callable[[], None]) -> bool:
    """Call ``draw``; without matplotlib, print what to install and return False."""
    try:
        draw()
    except ImportError as error:
        console.print(f"no plot: {error}")
        return False
    return True


def announce(message: str) -> None:
    """Print a line to stderr if it is a terminal, above another library's progress bars."""
    if _errors.is_terminal:
        _errors.print(message, style="dim")


@contextmanager
def live(total: float, first: str = "", is_shown: bool = True) -> Iterator[Callable[..., None]]:
    """Show progress: a transient bar if stderr is a terminal, elsewhere a line every ``SILENCE`` seconds.

    Call the yielded function with a description of the current work, and the bar's ``completed`` and ``total`` if they
    change. Nothing is shown unless ``is_shown``: with several processes, only one should show progress.
    """
    doing, started, over = first, time.monotonic(), Event()
    columns = BarColumn(bar_width=20), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    bar = Progress(*columns, console=_errors, transient=True, disable=not (is_shown and _errors.is_terminal))
    shown = bar.add_task(first, total=total)

    def update(what: str, completed: float | None = None, total: float | None = None) -> None:
        nonlocal doing
        doing = what
        bar.update(shown, description=what, completed=completed, total=total)

    def speak() -> None:
        while not over.wait(SILENCE):
            if doing:
                said = Text(f"{doing} ({time.monotonic() - started:.0f} s)")
                _errors.print(said, soft_wrap=True)

    if is_shown and not _errors.is_terminal:
        Thread(target=speak, daemon=True).start()
    try:
        with bar:
            yield update
    finally:
        over.set()


@contextmanager
def progress(n_steps: int) -> Iterator[Callable[[str], None]]:
    """:func:`live` for ``n_steps`` steps; call the yielded function, with a description, as each step begins."""
    with live(n_steps) as update:
        counter = itertools.count()
        yield lambda step: update(step, completed=next(counter))


def table(title: str, *columns: str, rows: Iterable[Iterable[RenderableType]] = (), left: str | None = None) -> Table:
    """A table of ``rows``: first column and the one called ``left`` left-aligned, the others right-aligned."""
    result = Table(title=title, title_justify="left", title_style="bold", header_style="")
    for i, name in enumerate(columns):
        result.add_column(name, justify="right" if i and name != left else "left")
    for row in rows:
        result.add_row(*row)
    return result


def si(number: float, unit: str = "") -> str:
    """Three digits and an SI prefix: ``si(12_345, "B")`` is ``"12.3 kB"``."""
    prefixes, i = " kMGTPE", 0
    while abs(number) >= 999.5 and i < len(prefixes) - 1:
        number, i = number / 1000, i + 1
    digits = f"{number:.3g}" if i else f"{number:g}"
    return f"{digits} {prefixes[i].strip()}{unit}".rstrip()
