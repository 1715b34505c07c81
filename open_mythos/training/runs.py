"""Layout of a run's directory. Models are found by :mod:`open_mythos.models`.

::

    RUN/lock               while a process writes to it: which one
    RUN/config.json        TrainConfig
    RUN/metrics.jsonl      a line every log_every steps
    RUN/checkpoints/       to resume from
    RUN/model/             config.json, model.safetensors (averaged weights), training.json (TrainConfig),
                           and tokenizer.json if it has a tokenizer
    RUN/evaluation.json    accuracy by difficulty and loops, at the end of training
    RUN/evaluation/        the same by mythos eval, with a picture; a report shows what was measured last
"""

import glob
import os
from pathlib import Path

from open_mythos import models, tasks
from open_mythos.evaluation.summary import FILE
from open_mythos.model import OpenMythos
from open_mythos.models import MODEL, TRAINING_FILE, home_dir, load_model, model_dir, tokenizer_of
from open_mythos.tasks import tokenizer
from open_mythos.tasks.text import Text
from open_mythos.training.config import TrainConfig

__all__ = ["MODEL", "TRAINING_FILE", "home_dir", "load_model", "model_dir", "tokenizer_of"]

RUN_CONFIG, METRICS, CHECKPOINTS, EVALUATION = "config.json", "metrics.jsonl", "checkpoints", FILE
NO_PATHS = ("", "stdlib", "bytes")  # names of sources, and of tokenizers


def everywhere(path: str) -> str:
    """Make a path, or ``hf:`` with a path, absolute if it exists; other names stay as they are."""
    if path in NO_PATHS:
        return path
    prefix, name, rest = "", path, ""
    if path.startswith("hf:"):
        prefix, (name, *config) = "hf:", path.removeprefix("hf:").split(":", 1)
        rest = "".join(f":{word}" for word in config)
    full = os.path.abspath(os.path.expanduser(name))
    there = os.path.exists(full) or next(glob.iglob(full, recursive=True), None) is not None
    return prefix + full + rest if there else path


def evaluation_dir(source: str | Path) -> Path:
    """Where to write evaluations of a model: ``evaluation`` in its run or directory, or a folder in ``runs`` if that is
    not writable."""
    home = home_dir(source)
    if Path(source).exists() and os.access(home, os.W_OK):
        return home / "evaluation"
    return Path("runs") / f"eval-{Path(source).name}"


def training_config(source: str | Path) -> TrainConfig:
    """The training config of the model found by :func:`model_dir`.

    Raises:
        ValueError: if there is no such model, or its training config is missing.
    """
    path = model_dir(source) / TRAINING_FILE
    if not path.is_file():
        raise ValueError(
            f"{path} is missing, so it is not known how {source} was trained; look inside with mythos diagnose, or "
            f"measure it on a task of your choice with mythos eval --task"
        )
    return TrainConfig.load(path)


def save_model(model: OpenMythos, cfg: TrainConfig, run: Path) -> Path:
    """Write RUN/model, with the tokenizer of the model it started from if that has one, and return its path."""
    directory = run / MODEL
    models.save_model(model, directory, cfg.start)
    cfg.save(directory / TRAINING_FILE)
    return directory


def own_tokens(task: str, directory: Path) -> dict[str, str]:
    """Task options that select the tokenizer of the model in ``directory``; {} if task or model have none."""
    if "tokenizer" not in tasks.options_of(task) or not (directory / tokenizer.FILE).is_file():
        return {}
    is_of_words = task != Text.name and isinstance(tokenizer.load(directory), tokenizer.WordLevel)
    return {} if is_of_words else {"tokenizer": str(directory)}


def held_out_options(source: str | Path, cfg: TrainConfig) -> dict[str, str]:
    """Options that make ``cfg.task`` generate held-out problems, in the model's own tokens."""
    split = {"split": "held_out"} if "split" in tasks.options_of(cfg.task.name) else {}
    directory = model_dir(source)
    by_bytes = cfg.task.name == Text.name and cfg.task.options.get("tokenizer", "bytes") == "bytes"
    is_trained = (directory / TRAINING_FILE).is_file()
    return split if by_bytes and is_trained else split | own_tokens(cfg.task.name, directory)
