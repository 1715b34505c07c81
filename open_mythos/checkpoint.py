"""Saving and loading a model as ``config.json`` and ``model.safetensors``. No pickle anywhere.

A folder is the same whether written here or by ``save_pretrained`` of :mod:`open_mythos.integrations.hf`.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from open_mythos.config import FORMAT_VERSION, MODEL_TYPE, MythosConfig
from open_mythos.interface import Model

Loaded = TypeVar("Loaded", bound=nn.Module)
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MODEL = "model"  # the folder of a run that these lie in
INDEX_FILE = "model.safetensors.index.json"  # instead of it, where weights are divided among several files
SHIPPED = Path(__file__).parent / "pretrained"
_WRAPPED = "core."  # of names in files that transformers wrote


class CheckpointError(ValueError):
    """A checkpoint file that is missing, damaged, or not one of ours; the message names it."""


def save(model: Model, directory: str | Path) -> None:
    """Write the model's config and weights into ``directory``, made if need be.

    Each file is written beside its place and moved there whole, weights first.

    Raises:
        CheckpointError: for weights that a file of plain numbers cannot hold, as int8 ones.
    """
    check_plain(model)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    left_out = ["head.weight"] if is_tied(model) else []
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in left_out}
    partial = directory / (WEIGHTS_FILE + ".partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(directory / WEIGHTS_FILE)
    partial = directory / (CONFIG_FILE + ".partial")
    partial.write_text(json.dumps(config_file(model), indent=2) + "\n")
    partial.replace(directory / CONFIG_FILE)
    # safetensors lets nobody else read what it writes
    shutil.copymode(directory / CONFIG_FILE, directory / WEIGHTS_FILE)


def check_plain(model: nn.Module) -> None:
    """CheckpointError for weights that a file of plain numbers cannot hold."""
    for name, tensor in model.state_dict().items():
        if type(tensor) is not Tensor:
            raise CheckpointError(
                f"{name} is of {type(tensor).__name__}, which cannot be saved; save the model before that is done to "
                f"it, and do it again to what is loaded"
            )


def config_file(model: Model) -> dict[str, Any]:
    """What ``config.json`` holds: what transformers asks for, and the fields of the config."""
    head = {
        "architectures": ["OpenMythosForCausalLM"],
        "dtype": str(model.embed.weight.dtype).removeprefix("torch."),
        "format_version": FORMAT_VERSION,
        "model_type": MODEL_TYPE,
    }
    lora = model.recurrent.lora  # its table may be longer than max_loop_iters, which can be changed at any time
    head |= {} if lora is None else {"lora_loops": lora.scale.num_embeddings}
    return head | model.cfg.to_dict() | {"tied_head": is_tied(model)}


def is_tied(model: Model) -> bool:
    """Whether the head still is the embedding: PEFT may have put a trained one in its place."""
    return model.cfg.tied_head and model.head.weight.data_ptr() == model.embed.weight.data_ptr()


def hub_hint(source: str | Path) -> str:
    """How to fetch what may be a name on the Hugging Face Hub; nothing for what cannot be one."""
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source))
    return f". From the Hugging Face Hub: hf download {source} --local-dir FOLDER" if is_name else ""


def shipped() -> list[str]:
    """Names of the trained models that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{WEIGHTS_FILE}"))


def load(cls: type[Loaded], source: str | Path) -> Loaded:
    """Build a saved model, in eval mode, in the dtype it was saved in.

    Args:
        cls: its class.
        source: the directory it was saved in, a run that holds one, or one of the names that :func:`shipped` gives.

    Raises:
        CheckpointError: naming the file at fault.
    """
    directory = Path(source)
    if not directory.exists() and str(source) in shipped():
        directory = SHIPPED / source
    directory = directory / MODEL if (directory / MODEL / CONFIG_FILE).is_file() else directory
    config_path, weights_path = directory / CONFIG_FILE, directory / WEIGHTS_FILE
    index_path = directory / INDEX_FILE
    weights_path = index_path if index_path.is_file() and not weights_path.is_file() else weights_path
    for path in (config_path, weights_path):
        if not path.is_file():
            hub = "" if directory.exists() else hub_hint(source)
            raise CheckpointError(
                f"{path} is missing; {directory} should hold {CONFIG_FILE} and {WEIGHTS_FILE}{_names()}{hub}"
            )
    try:
        cfg = MythosConfig.load(config_path)
    except ValueError as error:
        raise CheckpointError(f"not an open_mythos config: {error}") from error
    tensors = {name.removeprefix(_WRAPPED): tensor for name, tensor in _read(weights_path).items()}
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


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, or of all that an index names."""
    if path.name == INDEX_FILE:
        parts = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        return {name: tensor for part in parts for name, tensor in _read(path.parent / part).items()}
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({error}); save it again") from error


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
        raise CheckpointError(
            f"{path} is not a checkpoint of this model: it {' and '.join(parts)}; load it with the class that wrote "
            f"it, or save it again"
        )
