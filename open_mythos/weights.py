"""Files of weights: safetensors, with a checksum of the tensors' bytes in the metadata, which others pass over."""

import hashlib
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from open_mythos import files

CHECKSUM = "open_mythos.checksum"
_WIDTH = 521  # 8-byte words; odd, so that what changes places by pages, sectors or rows stands in another column
_ROW = 8 * _WIDTH  # bytes
_BLOCK = 512 * _ROW  # bytes that are copied and summed together, while they are in a cache


class CheckpointError(ValueError):
    """A checkpoint file that is missing, damaged, or not one of ours; the message names it."""


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write contiguous ``tensors`` with their checksum; OSError, naming the file, if that cannot be done."""
    metadata = {"format": "pt", CHECKSUM: _checksum({name: _sums(tensor) for name, tensor in tensors.items()})}
    with files.replacing(path) as partial:
        try:
            save_file(tensors, partial, metadata)
        except SafetensorError as error:  # its way to say that the disk is full
            raise OSError(str(error)) from error
        _order(partial)


def _order(path: Path) -> None:
    """Put the header's metadata in order, which safetensors shuffles: equal models are equal files."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def files_of(path: Path) -> list[Path]:
    """``path``, or if it is an index, the files of its folder that it names; CheckpointError for one that is none."""
    if not path.name.endswith(".index.json"):
        return [path]
    try:
        names = files.read_json(path, {"weight_map": {"*": str}})["weight_map"].values()
        parts = {files.inside(path.parent, name, f"{path}: weight_map") for name in names}
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    if not parts or path in parts:
        raise CheckpointError(f"{path}: weight_map names {'itself' if parts else 'no file'}; expected files of weights")
    for part in parts:
        if not part.is_file():
            raise CheckpointError(f"{path}: weight_map names {part.name!r}, which is missing; copy it too")
    return sorted(parts)


def shapes(path: Path) -> dict[str, torch.Size]:
    """Names and shapes in the header of a file; no tensor is read. Errors as :func:`read`."""
    with opened(path) as file:
        return {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def has_checksum(path: Path) -> bool:
    """Whether :func:`read` has something to compare its tensors with. Errors as :func:`read`."""
    with opened(path) as file:
        return CHECKSUM in (file.metadata() or {})


def read(path: Path, verify: bool = True) -> dict[str, Tensor]:
    """The tensors of a file, compared with its checksum if it has one and ``verify``.

    Raises:
        CheckpointError: naming it, if it is missing, truncated, damaged, or no safetensors file.
    """
    tensors, sums = dict[str, Tensor](), dict[str, bytes]()
    with opened(path) as file:
        expected = (file.metadata() or {}).get(CHECKSUM) if verify else None
        for name in file.keys():  # noqa: SIM118
            stored = file.get_tensor(name)
            tensors[name] = torch.empty_like(stored)
            if expected is None:
                tensors[name].copy_(stored)
            else:
                sums[name] = _sums(stored, tensors[name])
    if expected is not None and expected != _checksum(sums):
        raise CheckpointError(
            f"{path} is damaged: its weights do not have the checksum {expected:.40} that they were saved with; copy "
            f"or save it again (verify=False loads it as it is)"
        )
    return tensors


def check_archive(file: Path | BytesIO) -> bool:
    """Whether it is an archive, as torch.save writes; CheckpointError for one with packed entries, which it never does.

    Those could unpack to any size, and PyTorch would read them as if they were not packed.
    """
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise CheckpointError("its entries are packed, which torch.save never does; save it again")
    return True


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A file for safetensors to read; whatever fails inside is a CheckpointError that names it."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except Exception as error:  # safetensors' own, OSError, and KeyError for a dtype that PyTorch lacks
        raise CheckpointError(
            f"{path} is {'missing' if isinstance(error, FileNotFoundError) else 'truncated or not a safetensors file'} "
            f"({error}); copy or save it again"
        ) from error


def _checksum(sums: dict[str, bytes]) -> str:
    return hashlib.blake2b(b"".join(name.encode() + sums[name] for name in sorted(sums)), digest_size=16).hexdigest()


def _sums(tensor: Tensor, to: Tensor | None = None) -> bytes:
    """What a checksum is of: dtype, shape, and of each block of a tensor's bytes the sums of its columns.

    Sums are as fast as memory, which no checksum of the standard library is. One changed bit changes one, and what
    changes places changes several. ``tensor`` is copied ``to`` on the way.
    """
    sums = [f"{tensor.dtype}{tuple(tensor.shape)};".encode()]
    source = tensor.detach().cpu().reshape(-1).view(torch.uint8)
    target = source if to is None else to.view(-1).view(torch.uint8)
    for start in range(0, len(source), _BLOCK):
        block = target[start : start + _BLOCK]
        if to is not None:
            block.copy_(source[start : start + _BLOCK])
        if block.storage_offset() % 8:
            block = block.clone()
        whole = len(block) // _ROW * _ROW
        columns = block[:whole].view(torch.int64).view(-1, _WIDTH).sum(0)
        if whole < len(block):
            columns += F.pad(block[whole:], (0, whole + _ROW - len(block))).view(torch.int64)
        sums.append(columns.numpy().tobytes())
    return b"".join(sums)
