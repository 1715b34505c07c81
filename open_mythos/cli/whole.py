"""Integrity checks of the files of a model, a run or a folder of tokens, for ``mythos doctor PATH``."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from open_mythos import files, weights
from open_mythos.checkpoint import INDEX_FILE, WEIGHTS_FILE
from open_mythos.config import MythosConfig
from open_mythos.fields import must
from open_mythos.models import CARD, CONFIG_FILE, MODEL, SHIPPED, TOKENIZER_FILES, TRAINING_FILE, load_model, model_dir
from open_mythos.tasks import store, tokenizer
from open_mythos.training import checkpoints, compare, fit, loggers, runs
from open_mythos.training.config import TrainConfig


def examine(source: str) -> Iterator[tuple[Path, bool, str]]:
    """For each existing file: its path, whether it is whole, and what was checked or what is wrong.

    Raises:
        ValueError: if ``source`` is no model and no run.
    """
    run = Path(source) if Path(source).exists() else SHIPPED / source
    if store.is_store(run):
        yield from _examined(_of_tokens(run))
        return
    if not (run / runs.RUN_CONFIG).is_file() and not (run / MODEL).is_dir():
        run = model_dir(source)
    inner = run / MODEL if (run / MODEL).is_dir() else run
    checks = [*(_of_run(run) if inner != run or (run / runs.CHECKPOINTS).is_dir() else ()), *_of_model(inner)]
    yield from _examined(checks)


def _examined(checks: Iterable[tuple[Path, Callable[[Path], str]]]) -> Iterator[tuple[Path, bool, str]]:
    for path, check in checks:
        if path.exists() or path.is_symlink():
            try:
                yield path, True, check(files.own(path))
            except (ValueError, OSError, ImportError) as error:
                yield path, False, " ".join(str(error).split())


def _of_tokens(folder: Path) -> Iterator[tuple[Path, Callable[[Path], str]]]:
    yield folder / store.INDEX, lambda path: f"{len(store.opened(folder, 0).tokens['train']):,} tokens to train on"
    yield folder / tokenizer.FILE, lambda path: f"{len(tokenizer.load(folder).pieces)} tokens"
    try:
        index = store.read_index(folder)
    except (OSError, ValueError):  # already reported by the checks above
        return
    for name in store.PARTS:
        for before, shard in pairwise([store.Shard(), *index[name]]):
            yield folder / shard.file, partial(_shard, shard, before)


def _shard(shard: store.Shard, before: store.Shard, path: Path) -> str:
    store.check_content(path.parent, shard, before)
    return f"{shard.tokens:,} tokens, checksum verified"


def _of_model(directory: Path) -> Iterator[tuple[Path, Callable[[Path], str]]]:
    if not (directory / WEIGHTS_FILE).exists() and not (directory / INDEX_FILE).exists():
        return
    yield directory / CONFIG_FILE, lambda path: f"{MythosConfig.load(path).dim} wide"
    yield directory / WEIGHTS_FILE, lambda path: _weights(directory, [path])
    yield directory / INDEX_FILE, lambda path: _weights(directory, weights.files_of(path))
    yield directory / TRAINING_FILE, lambda path: f"trained by the recipe {TrainConfig.load(path).recipe}"
    yield directory / tokenizer.FILE, _tokenizer
    for name in TOKENIZER_FILES[1:]:
        yield directory / name, _json if name.endswith(".json") else _text
    yield directory / CARD, _text
    yield directory / "example.json", lambda path: f"{len(files.read_json(path, {'tokens': [int]})['tokens'])} tokens"


def _of_run(run: Path) -> Iterator[tuple[Path, Callable[[Path], str]]]:
    yield run / runs.RUN_CONFIG, lambda path: f"{TrainConfig.load(path).steps} steps"
    yield run / runs.METRICS, _metrics
    for checkpoint in sorted((run / runs.CHECKPOINTS).glob("step_*[0-9]")):
        yield checkpoint, lambda path: f"{len(checkpoints.load(path))} parts, checksums verified"
    for directory in (run, run / "evaluation"):
        yield directory / runs.EVALUATION, lambda path: f"{type(fit.load_evaluation(path.parent)).__name__}"
    yield run / compare.RESULTS, lambda path: f"{len(compare.load(path)['contenders'])} models"


def _weights(directory: Path, parts: list[Path]) -> str:
    try:
        load_model(directory)  # compares the config with the names and shapes, and each file with its checksum
    except ValueError as error:
        if TRAINING_FILE not in str(error):  # that file has a check of its own
            raise
        for part in parts:
            weights.verify_file(part)
    bare = [part.name for part in parts if not weights.has_checksum(part)]
    n = sum(len(weights.shapes(part)) for part in parts)
    return f"{n} tensors, " + (f"without a checksum: {', '.join(bare)}" if bare else "checksum verified")


def _tokenizer(path: Path) -> str:
    n, known = len(tokenizer.load(path.parent).pieces), MythosConfig.load(path.with_name(CONFIG_FILE)).vocab_size
    must(n <= known, f"{path} has {n} tokens, and the model {known}; use the tokenizer that the model was trained with")
    return f"{n} tokens"


def _metrics(path: Path) -> str:
    lines, damaged = loggers.read_lines(path)
    must(
        not damaged,
        f"{path} has {damaged} damaged lines; when training resumes, it sets this file aside and keeps the rest",
    )
    return f"{len(lines)} lines"


def _json(path: Path) -> str:
    data: dict[str, Any] = files.read_json(path)
    return f"{len(data)} entries"


def _text(path: Path) -> str:
    return f"{len(files.read_text(path))} characters"
