"""What lies where in a run's directory, and how to find a model by a path or a name.

::

    RUN/config.json        TrainConfig
    RUN/metrics.jsonl      a line every log_every steps
    RUN/checkpoints/       to go on from
    RUN/model/             config.json, model.safetensors (averaged weights), training.json (TrainConfig),
                           and of text tokenizer.json
    RUN/evaluation.json    accuracy by difficulty and loops, at the end of training
    RUN/evaluation/        the same by mythos eval, with a picture; a report shows what was measured last
"""

from __future__ import annotations

import glob
import os
import shutil
from pathlib import Path

from open_mythos.checkpoint import SHIPPED, WEIGHTS_FILE, hub_hint, shipped
from open_mythos.evaluation.summary import FILE
from open_mythos.fields import nearest
from open_mythos.model import OpenMythos
from open_mythos.tasks import tokenizer
from open_mythos.tasks.text import Text
from open_mythos.tasks.tokenizer import Tokenizer
from open_mythos.training.baselines import model_class
from open_mythos.training.config import TrainConfig

RUN_CONFIG, METRICS, CHECKPOINTS, MODEL, EVALUATION = "config.json", "metrics.jsonl", "checkpoints", "model", FILE
TRAINING_FILE = "training.json"
NO_PATHS = ("", "stdlib", "bytes")  # names of sources, and of tokenizers
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip
"""Of a pretrained model, beside its weights; the first is what the others add to."""


def model_dir(source: str | Path) -> Path:
    """The directory with a model's files.

    Args:
        source: a run, its model, any directory that ``save_pretrained`` wrote, or the name of a shipped model.

    Raises:
        ValueError: saying what is missing, or which names there are.
    """
    for directory in (Path(source) / MODEL, Path(source), SHIPPED / str(source)):
        if (directory / WEIGHTS_FILE).is_file():
            return directory
    if (Path(source) / RUN_CONFIG).is_file():
        raise ValueError(f"{source} has no {MODEL}/{WEIGHTS_FILE}: the run has not ended; go on with --resume auto")
    if Path(source).exists():
        raise ValueError(f"{source} is no run and no model: it holds neither {MODEL}/{WEIGHTS_FILE} nor {WEIGHTS_FILE}")
    names = shipped()
    hint = f" and no shipped model; {nearest(source, names)}" if names else ""
    raise ValueError(f"{source} is no directory{hint}{hub_hint(source)}")


def everywhere(path: str) -> str:
    """A path of the user's, or ``hf:`` with one, as it reads from any directory; a name that is no path stays."""
    if path in NO_PATHS:
        return path
    prefix, name, rest = "", path, ""
    if path.startswith("hf:"):
        prefix, (name, *config) = "hf:", path.removeprefix("hf:").split(":", 1)
        rest = "".join(f":{word}" for word in config)
    full = os.path.abspath(os.path.expanduser(name))
    there = os.path.exists(full) or next(glob.iglob(full, recursive=True), None) is not None
    return prefix + full + rest if there else path


def home_dir(directory: Path) -> Path:
    """The run that a model's ``directory`` lies in, or itself if it lies in none."""
    return directory.parent if directory.name == MODEL else directory


def evaluation_dir(source: str | Path) -> Path:
    """Where to write what is measured of a model: ``evaluation`` in its run or directory, or in ``runs`` if that is not
    ours to write to."""
    home = home_dir(model_dir(source))
    if Path(source).exists() and os.access(home, os.W_OK):
        return home / "evaluation"
    return Path("runs") / f"eval-{Path(source).name}"


def training_config(source: str | Path) -> TrainConfig:
    """How the model found by :func:`model_dir` was trained.

    Raises:
        ValueError: if there is no such model, or nothing says how it was trained.
    """
    path = model_dir(source) / TRAINING_FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing, so nothing says how {source} was trained; name its task by hand")
    return TrainConfig.load(path)


def save_model(model: OpenMythos, cfg: TrainConfig, run: Path) -> Path:
    """Write RUN/model, with the tokenizer of the model it started from if that has one, and return its path."""
    directory = run / MODEL
    model.save_pretrained(directory)
    if cfg.start:
        for name in TOKENIZER_FILES:
            if (found := model_dir(cfg.start) / name).is_file():
                shutil.copyfile(found, directory / name)
    cfg.save(directory / TRAINING_FILE)
    return directory


def tokenizer_of(source: str | Path) -> Tokenizer:
    """What the model found by :func:`model_dir` reads and writes text with.

    Raises:
        ValueError: as :func:`model_dir`, for a damaged ``tokenizer.json``, or if there is none.
        ImportError: naming the extra to install, if it needs a package that is not there.
    """
    directory = model_dir(source)
    if not (directory / tokenizer.FILE).is_file():
        raise ValueError(
            f"{directory} has no {tokenizer.FILE}, so {source} is no model of text; use text-tiny or a run of mythos "
            f"train text, or put the tokenizer that it was trained with there"
        )
    return tokenizer.load(directory)


def held_out_options(source: str | Path, cfg: TrainConfig) -> dict[str, str]:
    """Options that make ``cfg.task``, if it is text, that which training has not seen, in the model's own tokens."""
    if cfg.task.name != Text.name:
        return {}
    directory, trained = model_dir(source), cfg.task.options.get("tokenizer", "bytes") != "bytes"
    own = {"tokenizer": str(directory)} if trained and (directory / tokenizer.FILE).is_file() else {}
    return {"split": "held_out", **own}


def load_model(source: str | Path) -> OpenMythos:
    """The model found by :func:`model_dir`, in eval mode, of the class that it was trained as.

    Raises:
        ValueError: as :func:`model_dir`, or for damaged files.
    """
    directory = model_dir(source)
    trained = (directory / TRAINING_FILE).is_file()
    kind = model_class(training_config(source)) if trained else OpenMythos
    return kind.from_pretrained(directory)
