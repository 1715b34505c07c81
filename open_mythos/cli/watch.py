"""Live progress of training on a terminal."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console

from open_mythos.cli.console import fail, live, si
from open_mythos.training import distributed
from open_mythos.training.config import TrainConfig
from open_mythos.training.fit import Watch, stages
from open_mythos.training.loggers import Record
from open_mythos.training.trainer import Lost, TrainingError


@contextmanager
def reading(overrides: list[str]) -> Iterator[None]:
    """Show, inside the block, that text is being read, which may take a while."""
    sources = [text for text in overrides if text.startswith("data=")]
    if sources and distributed.rank() == 0:
        log(f"reading {sources[-1]}")
    with live(1, "reading", distributed.rank() == 0):
        yield


def log(message: str) -> None:
    Console(stderr=True).print(message, markup=False, emoji=False, highlight=False, soft_wrap=True)


@contextmanager
def watching(cfg: TrainConfig, again: str = "") -> Iterator[Watch]:
    """Show a live line of the training steps, and then of the stages after training: gate and evaluation.

    ``again`` is the command that resumes the run. A TrainingError ends the command by :func:`fail`.
    """
    n_stages, stage = stages(cfg), itertools.count(1)
    with live(cfg.steps, "the first steps", distributed.rank() == 0) as update:

        def record(numbers: Record) -> None:
            update(live_line(numbers, cfg.steps), numbers["step"])

        def begin(what: str) -> None:
            done = next(stage)
            update(f"after training, {done} of {n_stages}: {what}", done - 1, n_stages)

        try:
            yield Watch(record, log, begin, again)
        except TrainingError as error:
            fail(str(error), everywhere=isinstance(error, Lost))


def live_line(numbers: Record, steps: int) -> str:
    """The metrics of a step in one line; missing ones are left out."""
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
    sizes = {key.removeprefix("size_"): value for key, value in numbers.items() if key.startswith("size_")}
    if sizes:
        parts.append("size " + " ".join(f"{value:.2f} {name}" for name, value in sizes.items()))
    elif (size := numbers.get("size", 1)) is not None and size < 1:
        parts.append(f"size {size:.2f}")
    parts.append(f"{si(float(numbers['tokens_per_second'] or 0))} tokens/s")
    if numbers["skipped"]:
        parts.append(f"{numbers['skipped']} steps skipped")
    parts.append(f"{timedelta(seconds=round(float(numbers['eta_seconds'] or 0)))} left")
    return "  ".join(parts)
