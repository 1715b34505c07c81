"""Finding, loading and saving a model, with its tokenizer and its card, by a path or a name.

A model's directory holds ``config.json`` and ``model.safetensors``. There may be ``tokenizer.json``; ``README.md``, its
card; and ``training.json``, how it was trained. In a run it is ``RUN/model``.
"""

from collections.abc import Container
from pathlib import Path

from open_mythos import files
from open_mythos.arguments import checked
from open_mythos.checkpoint import CONFIG_FILE, INDEX_FILE, MODEL, SHIPPED, WEIGHTS_FILE, hub_hint, shipped
from open_mythos.fields import must, nearest
from open_mythos.model import OpenMythos, PlainMythos, UnrolledMythos
from open_mythos.tasks import tokenizer
from open_mythos.tasks.tokenizer import Tokenizer

TRAINING_FILE, CARD = "training.json", "README.md"
TOKENIZER_FILES = (
    tokenizer.FILE, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip
"""Tokenizer files beside a pretrained model's weights; the others only add to the first."""


@checked
def model_dir(source: str | Path) -> Path:
    """The directory with a model's files.

    Args:
        source: a run, its model, any directory that ``save_pretrained`` wrote, or the name of a shipped model.

    Raises:
        ValueError: saying what is missing, or which names there are.
    """
    for directory in (Path(source) / MODEL, Path(source), SHIPPED / str(source)):
        if any((directory / file).is_file() for file in (WEIGHTS_FILE, INDEX_FILE)):
            return directory
    if (Path(source) / CONFIG_FILE).is_file():
        raise ValueError(
            f"{source} has no {MODEL}/{WEIGHTS_FILE}: the run has not finished; continue it with --resume auto. If it "
            f"is a model, its {WEIGHTS_FILE} is missing; save it again"
        )
    if inside := sorted(Path(source).glob(f"*/{MODEL}")):
        raise ValueError(f"{source} contains several runs; give one of them, such as {inside[0].parent}")
    if Path(source).exists():
        raise ValueError(
            f"{source} is neither a run nor a model: it contains neither {MODEL}/{WEIGHTS_FILE} nor {WEIGHTS_FILE}"
        )
    names = shipped()
    said = f"neither a directory nor a shipped model; {nearest(source, names)}" if names else "not a directory"
    raise ValueError(f"{source} is {said}{hub_hint(source)}")


def remove_beside(directory: Path, kept: Container[str] = ()) -> None:
    """Remove what belongs to an earlier model in ``directory``: its tokenizer's files and training config."""
    for name in (*TOKENIZER_FILES, TRAINING_FILE):
        if name not in kept:
            (directory / name).unlink(missing_ok=True)


_OF_RUNS = CONFIG_FILE, "metrics.jsonl", "checkpoints", "evaluation.json"  # what a run has beside its model


@checked
def home_dir(source: str | Path) -> Path:
    """The run whose model :func:`model_dir` finds, or the model's own directory if it is in none; errors as there."""
    directory = model_dir(source)
    is_in_run = directory.name == MODEL and any((directory.parent / name).exists() for name in _OF_RUNS)
    return directory.parent if is_in_run or directory == Path(source) / MODEL else directory


@checked
def load_model(source: str | Path) -> OpenMythos:
    """The model found by :func:`model_dir`, in eval mode, of the class that it was trained as.

    Raises:
        ValueError: as :func:`model_dir`, or for damaged files.
    """
    directory, kind = model_dir(source), OpenMythos
    if (trained := directory / TRAINING_FILE).is_file():
        try:
            said = files.read_json(files.own(trained), {"kind": str})["kind"]
        except ValueError as error:
            raise ValueError(
                f"{trained} does not say how the model was trained ({error}); restore it, or remove it to load the "
                f"model as a looped one"
            ) from error
        kind = {"unrolled": UnrolledMythos, "plain": PlainMythos}.get(said, OpenMythos)
    return kind.from_pretrained(directory)


@checked
def tokenizer_of(source: str | Path) -> Tokenizer:
    """The tokenizer of the model found by :func:`model_dir`.

    Raises:
        ValueError: as :func:`model_dir`, for a damaged ``tokenizer.json``, or if there is none.
        ImportError: naming the extra to install, if it needs a package that is not there.
    """
    directory = model_dir(source)
    must(
        (directory / tokenizer.FILE).is_file(),
        f"{directory} has no {tokenizer.FILE}, so {source} is not a text model; use text-tiny or a run of mythos "
        f"train text, or copy the tokenizer that the model was trained with there",
    )
    return tokenizer.load(directory)


@checked
def card_of(source: str | Path) -> str:
    """The card of the model found by :func:`model_dir`, as Markdown; a shipped model's says how good it is.

    Raises:
        ValueError: as :func:`model_dir`, or if there is none.
    """
    path = model_dir(source) / CARD
    must(path.is_file(), f"{path} is missing, so {source} has no model card; for a run, see mythos report")
    return files.read_text(files.own(path))


@checked
def save_model(model: OpenMythos, directory: str | Path, source: str | Path = "") -> None:
    """Write a model, with the tokenizer, if there is one, of the model ``source`` that its training started from."""
    model.save_pretrained(directory)
    copy_tokenizer(source, Path(directory))


def copy_tokenizer(source: str | Path, directory: Path) -> None:
    """Write into ``directory`` the tokenizer of the model found by ``source``, if there is a source and it has one."""
    for name in TOKENIZER_FILES if source else ():
        if (found := model_dir(source) / name).is_file():
            files.write(directory / name, files.read_bytes(files.own(found)))
