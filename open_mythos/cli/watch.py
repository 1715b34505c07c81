"""What a terminal shows while a model trains."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from open_mythos.cli.console import si
from open_mythos.training import distributed
from open_mythos.training.fit import Watch
from open_mythos.training.loggers import Record

PLAIN_SECONDS = 10.0  # between lines where there is no terminal to update


@contextmanager
def reading(overrides: list[str]) -> Iterator[None]:
    """Says that text is being read, which may take a while."""
    errors, sources = Console(stderr=True), [text for text in overrides if text.startswith("data=")]
    if not sources or distributed.rank() > 0:
        yield
    elif errors.is_terminal:
        with errors.status(f"reading {escape(sources[-1])}"):
            yield
    else:
        errors.print(f"reading {sources[-1]}", markup=False, highlight=False, soft_wrap=True)
        yield


@contextmanager
def watching(steps: int) -> Iterator[Watch]:
    """A live line on a terminal's stderr, gone at the end; elsewhere a plain line every so often."""
    errors = Console(stderr=True)
    columns = BarColumn(bar_width=20), TextColumn("{task.description}")
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task, shown_at = bar.add_task("the first steps", total=steps), -PLAIN_SECONDS

        def plain(line: str) -> None:
            nonlocal shown_at
            if not errors.is_terminal and time.monotonic() - shown_at >= PLAIN_SECONDS:
                shown_at = time.monotonic()
                errors.print(line, markup=False, highlight=False, soft_wrap=True)

        def record(numbers: Record) -> None:
            line = live_line(numbers, steps)
            bar.update(task, description=escape(line), completed=numbers["step"])
            plain(line)

        def begin(what: str) -> None:
            bar.update(task, description=escape(what))
            plain(what)

        def say(message: str) -> None:
            bar.console.print(message, markup=False, highlight=False, soft_wrap=True)

        yield Watch(record, say, begin)


def live_line(numbers: Record, steps: int) -> str:
    """The numbers of a step in one line; those that there are."""
    shown = [f"step {numbers['step']}/{steps}"]
    for key, form in (
        ("loss", "loss {:.4f}"),
        ("accuracy", "accuracy {:.3f}"),
        ("loops", "loops {:.1f}"),
        ("spectral_radius", "max A {:.3f}"),
        ("expert_balance", "experts {:.2f}"),
        ("grad_norm", "gradient {:.2g}"),
        ("lr", "lr {:.1e}"),
    ):
        if (value := numbers.get(key)) is not None:
            shown.append(form.format(value))
    shown.append(f"{si(float(numbers['tokens_per_second'] or 0))} tokens/s")
    if numbers["skipped"]:
        shown.append(f"{numbers['skipped']} steps skipped")
    shown.append(f"{timedelta(seconds=round(float(numbers['eta_seconds'] or 0)))} left")
    return "  ".join(shown)
