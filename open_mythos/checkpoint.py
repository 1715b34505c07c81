"""Saving and loading a model as ``config.json`` and ``model.safetensors``. No pickle anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from open_mythos.config import MythosConfig

if TYPE_CHECKING:
    from open_mythos.model import OpenMythos

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
SHIPPED = Path(__file__).parent / "pretrained"


class CheckpointError(ValueError):
    """A checkpoint file that is missing, damaged, or not one of ours; the message names it."""


def save(model: OpenMythos, directory: str | Path) -> None:
    """Write the model's config and weights into ``directory``, made if need be.

    Each file is written beside its place and moved there whole, weights first.

    Raises:
        CheckpointError: for weights that a file of plain numbers cannot hold, as int8 ones.
    """
    for name, tensor in model.state_dict().items():
        if type(tensor) is not Tensor:
            raise CheckpointError(
                f"{name} is of {type(tensor).__name__}, which cannot be saved; save the model before that is done to "
                f"it, and do it again to what is loaded"
            )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in _tied(model.cfg)}
    partial = directory / (WEIGHTS_FILE + ".partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(directory / WEIGHTS_FILE)
    partial = directory / (CONFIG_FILE + ".partial")
    model.cfg.save(partial)
    partial.replace(directory / CONFIG_FILE)


def shipped() -> list[str]:
    """Names of the trained models that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{WEIGHTS_FILE}"))


def load(cls: type[OpenMythos], source: str | Path) -> OpenMythos:
    """Build a saved model, in eval mode, in the dtype it was saved in.

    Args:
        cls: its class.
        source: the directory it was saved in, or one of the names that :func:`shipped` gives.

    Raises:
        CheckpointError: naming the file at fault.
    """
    directory = Path(source)
    if not directory.exists() and str(source) in shipped():
        directory = SHIPPED / source
    config_path, weights_path = directory / CONFIG_FILE, directory / WEIGHTS_FILE
    for path in (config_path, weights_path):
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing; {directory} should hold {CONFIG_FILE} and {WEIGHTS_FILE}{_names()}"
            )
    try:
        cfg = MythosConfig.load(config_path)
    except ValueError as error:
        raise CheckpointError(f"not an open_mythos config: {error}") from error
    try:
        tensors = load_file(weights_path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{weights_path} is truncated or not a safetensors file ({error}); save it again"
        ) from error
    model = cls(cfg)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in _tied(cfg)}
    _check_names(weights_path, set(expected), set(tensors))
    model.to(tensors["embed.weight"].dtype)
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{weights_path} does not fit {config_path}: {error}") from error
    assert missing == _tied(cfg) and not unexpected, (missing, unexpected)
    return model.eval()


def _tied(cfg: MythosConfig) -> list[str]:
    """Names of tensors that are not stored, since another is the same."""
    return ["head.weight"] if cfg.tied_head else []


def _names() -> str:
    return f", or be the name of a shipped model: {', '.join(shipped())}" if shipped() else ""


def _check_names(path: Path, expected: set[str], found: set[str]) -> None:
    if expected != found:
        lacks, extra = sorted(expected - found), sorted(found - expected)
        parts = [
            f"{word} {len(names)} tensors such as {names[0]!r}"
            for word, names in (("lacks", lacks), ("has", extra))
            if names
        ]
        raise CheckpointError(f"{path} is not a checkpoint of this model: it {' and '.join(parts)}")
