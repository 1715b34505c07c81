"""Saving and loading a model as ``config.json`` and ``model.safetensors``, or shards with an index. No pickle anywhere.

A folder is the same whether written here or by ``save_pretrained`` of :mod:`open_mythos.integrations.hf`.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from open_mythos import files, weights
from open_mythos.config import FORMAT_VERSION, MODEL_TYPE, MythosConfig
from open_mythos.interface import Model
from open_mythos.weights import CheckpointError

Loaded = TypeVar("Loaded", bound=Model)
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MODEL = "model"  # the folder of a run that holds these files
INDEX_FILE = WEIGHTS_FILE + weights.INDEX  # in its place, where weights are sharded
SHARD = "50GB"  # largest file of weights, as in transformers
SHIPPED = Path(__file__).parent / "pretrained"
FIGURES = "figures.json"  # the numbers on a shipped model's card
MOST_LOOPS = 1 << 16
_PART = re.compile(r"-\d{5}-of-\d{5}(?=\.safetensors$)")  # in the file name of a shard
PREFIX = "core."  # of tensor names in files that transformers wrote


def save(model: Model, directory: str | Path, max_shard_size: int | str = SHARD) -> None:
    """Write the model's config and weights into ``directory``, which is created if it is missing.

    All files are written beside their places and moved there when all are complete.

    Args:
        model, directory: as above.
        max_shard_size: largest file of weights, in bytes or as in "5GB"; larger models are sharded, with an index.

    Raises:
        CheckpointError: for weights that safetensors cannot hold, such as torchao's int8 ones.
        ValueError: for an invalid size.
        OSError: if the folder cannot be written; it is then as it was.
    """
    check_plain(model)
    directory, most = Path(directory), weights.n_bytes(max_shard_size)
    with files.replacing_folder(directory) as partial:
        made = weights.write_divided(partial / WEIGHTS_FILE, stored(model), most)
        files.write_json(partial / CONFIG_FILE, config_file(model), indent=2)
    remove_earlier(directory, {path.name for path in made})


def stored(model: Model) -> dict[str, Tensor]:
    """The tensors that are written to the model's weights file: all but a tied head."""
    left_out = ["head.weight"] if is_tied(model) else []
    return {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}


def remove_earlier(directory: Path, made: set[str]) -> None:
    """Remove what an earlier save of these weights, whole or in parts, has left beside the files just ``made``."""
    wholes = {_PART.sub("", name) for name in made if name.endswith(".safetensors")}
    for file in directory.iterdir():
        if file.name not in made and _PART.sub("", file.name).removesuffix(weights.INDEX) in wholes:
            file.unlink()


def check_plain(model: nn.Module) -> None:
    """CheckpointError for weights that could not be read back: of a tensor subclass, such as int8 ones, or in parts."""
    state = model.state_dict()
    for name, tensor in state.items():
        if ".parametrizations." in name or (name.endswith("_orig") and name.removesuffix("_orig") + "_mask" in state):
            raise CheckpointError(
                f"{name} is a part of a pruned or parametrized weight; make the weight whole before saving, with "
                f"torch.nn.utils.prune.remove or torch.nn.utils.parametrize.remove_parametrizations"
            )
        if type(tensor) is not Tensor:
            raise CheckpointError(
                f"{name} has type {type(tensor).__name__}, which cannot be saved; save the model before converting its "
                f"weights, and convert them again after loading"
            )


def config_file(model: Model) -> dict[str, Any]:
    """The content of ``config.json``: what transformers requires, and the fields of the config."""
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
    """How to download ``source`` if it looks like a name on the Hugging Face Hub, else ``""``."""
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source))
    return f". From the Hugging Face Hub: hf download {source} --local-dir FOLDER" if is_name else ""


def shipped() -> list[str]:
    """Names of the trained models that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{WEIGHTS_FILE}"))


def load(cls: type[Loaded], source: str | Path, verify: bool = True) -> Loaded:
    """Build a saved model, in eval mode, in the dtype it was saved in.

    Tensor names and shapes in the weights' header are compared with those that the config implies before anything is
    allocated. The weights are verified against the checksum in their file as they are read, if it has one: files of
    transformers, or of an older version, have none.

    Args:
        cls: its class.
        source: the directory it was saved in, a run that holds one, or one of the names that :func:`shipped` gives.
        verify: whether to check the checksum.

    Raises:
        CheckpointError: naming the file at fault.
    """
    directory = Path(source)
    if not directory.exists() and str(source) in shipped():
        directory = SHIPPED / source
    directory = directory / MODEL if (directory / MODEL / CONFIG_FILE).is_file() else directory
    config_path, weights_path = directory / CONFIG_FILE, _weights_of(directory)
    for path in (config_path, weights_path):
        if not path.is_file():
            hub = "" if directory.exists() else hub_hint(source)
            raise CheckpointError(
                f"{path} is missing; {directory} should hold {CONFIG_FILE} and {WEIGHTS_FILE}{_names()}{hub}"
            )
    _check_links(weights_path, config_path)
    try:
        cfg = MythosConfig.load(config_path)
    except ValueError as error:
        raise CheckpointError(f"not an open_mythos config: {error}") from error
    parts = weights.files_of(weights_path, verify)
    shapes = _shapes(parts)
    model = _judged(cls, cfg, config_path, weights_path, shapes)
    tensors = {name.removeprefix(PREFIX): t for part in parts for name, t in weights.read(part, verify).items()}
    dtype = tensors["embed.weight"].dtype
    if not dtype.is_floating_point:
        raise CheckpointError(
            f"{weights_path} has weights of {dtype}; expected floating-point ones: save the model unquantized"
        )
    model.to(dtype)
    kinds = model.state_dict()  # whose dtypes count: some buffers stay float32 in a model of any dtype
    tensors = {name: tensor.to(kinds[name].dtype) for name, tensor in tensors.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    assert missing == _tied(cfg) and not unexpected, (missing, unexpected)
    return model.eval()


def verify_files(cls: type[Model], directory: Path) -> None:
    """Verify a saved model's files for another library to read: links, index, checksums, sizes of the model ``cls``.

    Raises:
        CheckpointError: naming the file at fault. Files that are missing, and configs that are not of this library's
            models, are left to that library.
    """
    config_path, weights_path = directory / CONFIG_FILE, _weights_of(directory)
    _check_links(*(path for path in (config_path, weights_path) if path.is_file()))
    if not weights_path.is_file():
        return
    parts = weights.files_of(weights_path)
    for part in parts:
        weights.verify_file(part)
    try:
        cfg = MythosConfig.load(config_path)
    except (FileNotFoundError, ValueError):
        return
    shapes = _shapes(parts)
    _check_layers(cls, cfg, config_path, weights_path, shapes)
    expected = cfg.vocab_size, cfg.dim
    if (found := tuple(shapes.get("embed.weight", expected))) != expected:
        raise CheckpointError(
            f"{config_path} has vocab_size={cfg.vocab_size} and dim={cfg.dim}, but embed.weight in {weights_path} has "
            f"shape {found}; use the config that these weights were saved with"
        )


def _weights_of(directory: Path) -> Path:
    """The file of a saved model's weights, or the index of their shards."""
    path, index = directory / WEIGHTS_FILE, directory / INDEX_FILE
    return index if index.is_file() and not path.is_file() else path


def _check_links(*paths: Path) -> None:
    try:
        for path in paths:
            files.own(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _shapes(parts: Sequence[Path]) -> dict[str, torch.Size]:
    """Shapes of the tensors in all files, by name; CheckpointError if one is there twice, by both of its names."""
    shapes = dict[str, torch.Size]()
    for part in parts:
        for name, shape in weights.shapes(part).items():
            if (own := name.removeprefix(PREFIX)) in shapes:
                raise CheckpointError(f"{part} has {name!r}, but there is another {own!r}; save the model again")
            shapes[own] = shape
    return shapes


def _check_layers(
    cls: type[Model], cfg: MythosConfig, config_path: Path, weights_path: Path, shapes: dict[str, torch.Size]
) -> None:
    """CheckpointError for more layers than tensors, before that many modules are made."""
    for field in cls.LAYERS:
        if getattr(cfg, field) > len(shapes):
            raise CheckpointError(
                f"{config_path} has {field}={getattr(cfg, field)}, but {weights_path} only {len(shapes)} tensors; use "
                f"the config that these weights were saved with"
            )


def _judged(
    cls: type[Loaded], cfg: MythosConfig, config_path: Path, weights_path: Path, shapes: dict[str, torch.Size]
) -> Loaded:
    """The model on the meta device; CheckpointError unless its tensors are those of the weights' files."""
    _check_layers(cls, cfg, config_path, weights_path, shapes)
    if cfg.max_loop_iters > MOST_LOOPS:  # the LoRA table has a row for each
        raise CheckpointError(
            f"{config_path} has max_loop_iters={cfg.max_loop_iters}; a file may have at most {MOST_LOOPS}, and "
            f"model.cfg.max_loop_iters can be raised after loading"
        )
    try:
        model = without_storage(cls, cfg)
    except ValueError as error:
        raise CheckpointError(f"{config_path}: {error}") from error
    _check_names(weights_path, model.state_dict().keys() - _tied(cfg), set(shapes))
    try:
        model.load_state_dict({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{weights_path} does not fit {config_path}: {error}") from error
    return model


def without_storage(cls: type[Loaded], cfg: MythosConfig) -> Loaded:
    """The model of a config, on the meta device; ValueError, naming the largest size, if no tensor can be so large."""
    try:
        with torch.device("meta"), _NothingDrawn():
            return cls(cfg)
    except (RuntimeError, OverflowError, TypeError) as error:
        sizes = {name: value for name, value in cfg.to_dict().items() if isinstance(value, int)}
        largest = max(sizes, key=sizes.__getitem__)
        raise ValueError(
            f"sizes too large for any tensor, such as {largest}={sizes[largest]}; use smaller ones"
        ) from error


class _NothingDrawn(TorchFunctionMode):
    """Skip random initialisation: on the meta device it would only make torch import its compiler, for a second."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.normal_, torch.nn.init.normal_):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def _tied(cfg: MythosConfig) -> list[str]:
    """Names of tensors that are not stored, since they are tied to another."""
    return ["head.weight"] if cfg.tied_head else []


def _names() -> str:
    return f", or be the name of a shipped model: {', '.join(shipped())}" if shipped() else ""


def _check_names(path: Path, expected: set[str], found: set[str]) -> None:
    if expected != found:
        lacks, extra = sorted(expected - found), sorted(found - expected)
        parts = [
            f"{word} tensors such as {names[0]!r}"
            for word, names in ((f"lacks {len(lacks)}", lacks), (f"has {len(extra)} unexpected", extra))
            if names
        ]
        raise CheckpointError(
            f"{path} is not a checkpoint of this model: it {' and '.join(parts)}; load it with the class that wrote "
            f"it, or save it again"
        )
