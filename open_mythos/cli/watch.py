"""Live progress of training on a terminal."""

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

LINE_SECONDS = 10.0  # between lines if stderr is no terminal


@contextmanager
def reading(overrides: list[str]) -> Iterator[None]:
    """Show that text is being read, which may take a while."""
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
    """A transient live line on a terminal's stderr; otherwise a line every :data:`LINE_SECONDS`."""
    errors = Console(stderr=True)
    columns = BarColumn(bar_width=20), TextColumn("{task.description}")
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task, printed_at = bar.add_task("the first steps", total=steps), -LINE_SECONDS

        def log(message: str) -> None:
            bar.console.print(message, markup=False, highlight=False, soft_wrap=True)

        def update(line: str, step: float | None = None) -> None:
            nonlocal printed_at
            bar.update(task, description=escape(line), completed=step)
            if not errors.is_terminal and time.monotonic() - printed_at >= LINE_SECONDS:
                printed_at = time.monotonic()
                log(line)

        yield Watch(lambda record: update(live_line(record, steps), record["step"]), log, update)


def live_line(numbers: Record, steps: int) -> str:
    """The metrics of a step in one line, without missing ones."""
    parts = [f"step {numbers['step']}/{steps}"]
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
            parts.append(form.format(value))
    parts.append(f"{si(float(numbers['tokens_per_second'] or 0))} tokens/s")
    if numbers["skipped"]:
        parts.append(f"{numbers['skipped']} steps skipped")
    parts.append(f"{timedelta(seconds=round(float(numbers['eta_seconds'] or 0)))} left")
    return "  ".join(parts)
