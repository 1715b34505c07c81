"""Metric loggers: metrics.jsonl always; TensorBoard, trackio and W&B on request."""

import json
import math
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from open_mythos.fields import nearest
from open_mythos.install import missing

Record = dict[str, float | int | None]


class Logger(Protocol):
    def log(self, record: Record) -> None:
        """Log the metrics of the steps since the last call, up to ``record["step"]``."""

    def close(self) -> None:
        """Flush and close."""


class MetricsFile:
    """JSON lines, flushed at every line; non-finite numbers become null.

    Args:
        path: appended to.
        after_step: step that the run resumes from; lines of later steps, and a truncated last line, are dropped.
    """

    def __init__(self, path: Path, after_step: int) -> None:
        kept = [line for line in read_metrics(path) if line["step"] <= after_step] if path.exists() else []
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.replace(path)
        self.file = path.open("a")

    def log(self, record: Record) -> None:
        finite = {key: value if value is None or math.isfinite(value) else None for key, value in record.items()}
        self.file.write(json.dumps(finite) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without a truncated last line."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class TensorBoard:
    """Scalars under RUN/tensorboard; a resumed run hides the steps that it repeats."""

    def __init__(self, run: Path, config: dict[str, Any], after_step: int) -> None:
        writer = _import("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self.writer = writer(str(run / "tensorboard"), purge_step=after_step + 1)
        self.writer.add_text("config", f"```json\n{json.dumps(config, indent=2)}\n```")

    def log(self, record: Record) -> None:
        for key, value in record.items():
            if key != "step" and value is not None:
                self.writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self.writer.close()


class Tracker:
    """W&B, or trackio, which has the same interface. A resumed run becomes a new one of the same name there."""

    def __init__(self, package: str, run: Path, config: dict[str, Any], **options: Any) -> None:
        self.package = _import(package, package)
        self.package.init(project="open-mythos", name=run.name, config=config, **options)

    def log(self, record: Record) -> None:
        metrics = {key: value for key, value in record.items() if value is not None and key != "step"}
        self.package.log(metrics, step=record["step"])

    def close(self) -> None:
        self.package.finish()


LOGGERS: dict[str, Callable[[Path, dict[str, Any], int], Logger]] = {
    "tensorboard": TensorBoard,
    "trackio": lambda run, config, after_step: Tracker("trackio", run, config),
    "wandb": lambda run, config, after_step: Tracker("wandb", run, config, dir=str(run)),
}


def open_loggers(names: str, run: Path, config: dict[str, Any], after_step: int) -> list[Logger]:
    """The metrics file of a run, and the loggers ``names`` (keys of ``LOGGERS``, comma-separated).

    ``config`` is logged with the curves; ``after_step`` is the step that the run resumes from.

    Raises:
        ValueError: for an unknown name, with the nearest known one.
        ImportError: naming the extra, if a logger's package is not installed.
    """
    requested = [name.strip() for name in names.split(",") if name.strip()]
    for name in requested:
        if name not in LOGGERS:
            raise ValueError(f"loggers={names!r}: unknown logger {name!r}; {nearest(name, LOGGERS)}")
    extra = [LOGGERS[name](run, config, after_step) for name in requested]
    return [MetricsFile(run / "metrics.jsonl", after_step), *extra]


def _import(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise missing(f"loggers={package} needs {package}", "loggers") from error
