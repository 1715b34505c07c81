"""Which files a command may replace: only those that this command, or an earlier run of it, wrote."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from open_mythos import files
from open_mythos.checkpoint import CONFIG_FILE, MODEL_TYPE, WEIGHTS_FILE
from open_mythos.fields import must
from open_mythos.models import CARD, TOKENIZER_FILES, TRAINING_FILE
from open_mythos.training import runs

MARK = b"OpenMythos"  # in the first bytes of our HTML pages and pictures
_AHEAD = 4096
_SAID_BY_RUNS = {"recipe", "task"}
_OURS: dict[str, Callable[[Any], bool]] = {  # by name, how our JSON files are recognised
    "evaluation.json": lambda data: "grids" in data or "bits_per_byte" in data,
    "compare.json": lambda data: "contenders" in data,
    "harness.json": lambda data: all("higher_is_better" in curve for curve in data),
    "table.json": lambda data: all(" bits" in name for name in data),
    "example.json": lambda data: "tokens" in data,
    CONFIG_FILE: lambda data: data.get("model_type") == MODEL_TYPE or data.keys() >= _SAID_BY_RUNS,
}


def may_replace(*paths: Path) -> None:
    """ValueError, before anything is computed, for an existing file that no command of this library wrote."""
    for path in paths:
        must(
            not (path.exists() or path.is_symlink()) or _is_ours(path),
            f"{path} exists and was not written by this command, so it is not overwritten; give another path, or move "
            f"it away",
        )


def may_replace_model(directory: Path, is_agreed: bool) -> None:
    """As :func:`may_replace`, for a folder with a model's files: the config says whether they are of this library.

    An existing model may be replaced only if ``is_agreed``: in the command's default place, or if the user said so.
    """
    is_run = (directory / runs.MODEL).is_dir() or (directory / runs.CHECKPOINTS).is_dir()
    must(not is_run, f"{directory} is a run; give another directory")
    is_free = is_agreed or not (directory / CONFIG_FILE).exists()
    must(is_free, f"{directory} holds a model, which is not overwritten; give another directory, or move it away")
    if not (directory / CONFIG_FILE).exists():
        names = WEIGHTS_FILE, TRAINING_FILE, CARD, *TOKENIZER_FILES
        may_replace(*(directory / name for name in names))
    may_replace(directory / CONFIG_FILE)


def may_replace_run(run: Path) -> None:
    """As :func:`may_replace`, for all that training writes: files beside a run's config belong to the run."""
    config = run / runs.RUN_CONFIG
    must(
        not config.exists() or (run / runs.CHECKPOINTS).is_dir() or _is_of_run(config),
        f"{config} exists and is not of a training run, so it is not overwritten; give another directory",
    )
    if not config.exists():
        may_replace_model(run / runs.MODEL, is_agreed=True)
        may_replace(run / runs.METRICS, run / runs.CHECKPOINTS, run / runs.EVALUATION)


def _is_of_run(config: Path) -> bool:
    try:
        return files.read_json(config).keys() >= _SAID_BY_RUNS
    except (OSError, ValueError):  # damaged: then it is of a run if there are checkpoints beside it
        return False


def _is_ours(path: Path) -> bool:
    try:
        if path.name in _OURS:
            return _OURS[path.name](files.read_json(path, (dict, list)))
        with files.opened(path) as file:
            return path.suffix in (".html", ".htm", ".png") and MARK in file.read(_AHEAD)
    except (OSError, ValueError, AttributeError, TypeError):
        return False
