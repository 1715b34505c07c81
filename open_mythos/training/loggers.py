"""Metric loggers: metrics.jsonl always; TensorBoard, trackio and W&B on request."""

import itertools
import json
import math
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from open_mythos import files
from open_mythos.fields import nearest
from open_mythos.install import missing

Record = dict[str, float | int | None]


class Logger(Protocol):
    def log(self, record: Record) -> None:
        """Log the metrics of the steps since the last call, up to ``record["step"]``."""

    def close(self) -> None:
        """Flush and close."""


class MetricsFile:
    """JSON lines, written unbuffered; non-finite numbers become null.

    Lines that cannot be written are kept in memory and written with the next one, or at the end.

    Args:
        path: appended to.
        after_step: step that the run resumes from; lines of later steps, and a truncated last line, are dropped. A
            file with damaged lines is kept under another name, and a new one starts with the lines that can be read.
        say: called with a message if lines are damaged.
    """

    def __init__(self, path: Path, after_step: int, say: Callable[[str], None] = lambda message: None) -> None:
        lines, damaged = read_lines(path) if path.exists() else ([], 0)
        content = "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= after_step)
        if damaged:
            aside = next(
                a for n in itertools.count(1) if not (a := path.with_name(f"{path.name}.damaged-{n}")).exists()
            )
            files.write(aside, path.read_bytes())
            say(
                f"{path} has {damaged} damaged lines: it is kept as {aside.name}, and a new file continues without them"
            )
        files.write(path, content)
        self.path, self.size, self.waiting = path, len(content), b""

    def log(self, record: Record) -> None:
        finite = {key: value if value is None or math.isfinite(value) else None for key, value in record.items()}
        self.waiting += f"{json.dumps(finite)}\n".encode()
        self._write()

    def _write(self) -> None:
        try:
            with self.path.open("r+b", buffering=0) as file:  # fails if the file has vanished, unlike "ab"
                file.seek(self.size)
                while self.waiting:
                    n = file.write(self.waiting)
                    self.size, self.waiting = self.size + n, self.waiting[n:]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def close(self) -> None:
        """Write what is waiting, if it can be written now; what failed was reported when it did."""
        with suppress(OSError):
            self._write()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without damaged ones and a truncated last one."""
    return read_lines(path)[0]


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a metrics file that can be read, and the number of damaged ones."""
    lines, damaged = list[dict[str, Any]](), 0
    for line in path.read_text(errors="replace").split("\n")[:-1]:
        try:
            lines.append(files.parse_json(line, str(path), {"step": int, "*": (float, type(None))}))
        except ValueError:
            damaged += 1
    return lines, damaged


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
    """W&B, or trackio, which has the same interface. A resumed run is logged as a new run of the same name."""

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


def open_loggers(
    names: str, run: Path, config: dict[str, Any], after_step: int, say: Callable[[str], None] = print
) -> list[Logger]:
    """The metrics file of a run, and the loggers ``names`` (keys of ``LOGGERS``, comma-separated).

    ``config`` is logged with the curves; ``after_step`` is the step that the run resumes from; ``say`` gets messages.

    Raises:
        ValueError: for an unknown name, with the nearest known one.
        ImportError: naming the extra, if a logger's package is not installed.
    """
    extra = [LOGGERS[name](run, config, after_step) for name in requested(names)]
    return [MetricsFile(run / "metrics.jsonl", after_step, say), *extra]


def requested(names: str) -> list[str]:
    """The loggers ``names``; errors as :func:`open_loggers`, before anything is written."""
    found = [name.strip() for name in names.split(",") if name.strip()]
    for name in found:
        if name not in LOGGERS:
            raise ValueError(f"loggers={names!r}: unknown logger {name!r}; {nearest(name, LOGGERS)}")
        _import("torch.utils.tensorboard" if name == "tensorboard" else name, name)
    return found


def _import(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise missing(f"loggers={package} needs {package}", "loggers") from error
