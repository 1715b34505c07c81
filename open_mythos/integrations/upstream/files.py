"""Reading a checkpoint of the reference. Only tensors and plain values are read from a file; no code in it is run."""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_mythos import files, weights
from open_mythos.checkpoint import CONFIG_FILE, WEIGHTS_FILE, CheckpointError

BIN_FILE = "pytorch_model.bin"
_TENSORS_UNDER = ("model", "model_state_dict", "state_dict")
_CONFIG_UNDER = ("cfg", "config")
_CONFIG_CLASS = "open_mythos.main.MythosConfig"  # as the reference's training script pickles it
# Parts that wrappers add to the names of tensors: torch.compile, DDP, FSDP, activation checkpointing
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_ANCHOR = "recurrent.injection.log_A"


@dataclass
class Checkpoint:
    """The content of a checkpoint's file or folder."""

    path: Path
    tensors: dict[str, Tensor]  # by their names in the reference
    fields: dict[str, Any] = field(default_factory=dict)  # its config as plain values; empty if it has none
    fields_from: str = ""  # the file that they were found in


class _Record:
    """Stands in for the class of the reference's config when it is unpickled: holds its fields as attributes."""


def read(path: Path) -> Checkpoint:
    """Read a checkpoint from a torch.save or safetensors file, or a folder with either and a config.json.

    CheckpointError for any other file, saying what it is and what to do.
    """
    if path.is_dir():
        parts, config = _weight_files(path), path / CONFIG_FILE
    elif path.is_file():
        parts, config = [path], path.parent / CONFIG_FILE
    else:
        raise CheckpointError(
            f"{path} does not exist; give a torch.save or safetensors file, or a folder that contains one and "
            f"{CONFIG_FILE}"
        )
    found = Checkpoint(path, {})
    for file in parts:
        tensors, fields = _read_file(file)
        found.tensors |= tensors
        if fields:
            found.fields, found.fields_from = fields, str(file)
    beside = path.is_dir() or path.suffix in (".safetensors", ".bin")  # how Hugging Face lays files out
    if not found.fields and beside and config.is_file():
        found.fields, found.fields_from = read_config(config), str(config)
    found.tensors = _reference_names(found.tensors)
    return found


def read_config(path: Path) -> dict[str, Any]:
    """The values of a JSON config; CheckpointError, naming the file, if it is missing or no JSON object."""
    try:
        return files.read_json(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{error}; fix it, or give another config with --config") from error


def _weight_files(folder: Path) -> list[Path]:
    for name in (WEIGHTS_FILE, BIN_FILE):
        index = folder / f"{name}.index.json"
        if index.is_file():
            return weights.files_of(index)
        if (folder / name).is_file():
            return [files.inside(folder, name, str(folder))]
    there = sorted(path.name for path in folder.iterdir())
    raise CheckpointError(
        f"{folder} contains neither {WEIGHTS_FILE} nor {BIN_FILE}; give the file itself"
        + (f", one of {', '.join(there[:8])}" if there else "; the folder is empty")
    )


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config fields of one file."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; download it too")
    try:
        with files.opened(path) as file:
            start = file.read(64)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights; fetch them with: git lfs pull")
    if path.suffix == ".safetensors":
        return weights.read(path), {}
    try:  # weights_only: PyTorch's unpickler then builds tensors and plain values only
        is_archive = weights.check_archive(path)
        with torch.serialization.safe_globals([(_Record, _CONFIG_CLASS)]):
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # on bytes that are no pickle, any exception may be raised
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if foreign is None:
            raise CheckpointError(
                f"{path} is truncated, damaged, or not a file that torch.save wrote "
                f"({type(error).__name__}); download or save it again"
            ) from error
        raise CheckpointError(
            f"{path} contains more than weights: rebuilding its {foreign[1]} would run code from the file. None of it "
            f"was run. If you trust it, load it where it was written and save plain values: "
            f"c = torch.load({path.name!r}, weights_only=False); "
            f"torch.save({{'model': c['model'], 'cfg': vars(c['cfg'])}}, 'weights.pt') - or, if c is a whole model, "
            f"{{'model': c.state_dict(), 'cfg': vars(c.cfg)}}. Then convert weights.pt"
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, not a model's tensors; save its state_dict()")
    # the tensors themselves, or a dictionary around them
    tensors = next((data[key] for key in _TENSORS_UNDER if isinstance(data.get(key), dict)), data)
    config = next((data[key] for key in _CONFIG_UNDER if key in data), None)
    fields = vars(config) if isinstance(config, _Record) else config
    named = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
    if not named:
        raise CheckpointError(
            f"{path} contains no tensors, but {', '.join(map(str, list(data)[:8])) or 'nothing'}; put the weights at "
            f"the top level, or under one of {', '.join(_TENSORS_UNDER)}"
        )
    return named, dict(fields) if isinstance(fields, dict) else {}


def _reference_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the reference's names, without what wrappers have added to or put before these."""
    plain = {".".join(part for part in name.split(".") if part not in _WRAPPERS): t for name, t in tensors.items()}
    prefix = next((name.removesuffix(_ANCHOR) for name in plain if name.endswith("." + _ANCHOR)), "")
    plain = {name.removeprefix(prefix): tensor for name, tensor in plain.items()}
    if "lm_head.weight" in plain:
        plain["head.weight"] = plain.pop("lm_head.weight")
    if "embed.weight" not in plain and "head.weight" in plain:  # one tensor, which safetensors stores once
        plain["embed.weight"] = plain.pop("head.weight")
    return plain
