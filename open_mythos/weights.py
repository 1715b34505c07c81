"""Files of weights: safetensors, with a checksum of the tensors' bytes in the metadata, which other readers ignore."""

import hashlib
import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from open_mythos import files

CHECKSUM = "open_mythos.checksum"
INDEX = ".index.json"  # suffix of the file that says which shard holds each tensor
_WIDTH = 521  # 8-byte words; odd, so that data moved by pages, sectors or rows lands in another column
_ROW = 8 * _WIDTH  # bytes
_BLOCK = 512 * _ROW  # bytes that are copied and then summed, while they are in the CPU's cache


class CheckpointError(ValueError):
    """A checkpoint file that is missing, damaged, or not one of ours; the message names it."""


def write(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write tensors with their checksum, one after the other; OSError, naming the file, if it cannot be written.

    A value may also be lazy, with a ``shape`` and a ``dtype``, and be read by indexing with (), as tensors on disk are:
    no more than one is in memory at a time. Equal tensors make equal files.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # so all are aligned
    ends = list(accumulate((size_of(tensors[name]) for name in names), initial=0))
    placed = {
        name: {"dtype": _kind(tensors[name].dtype), "shape": list(tensors[name].shape), "data_offsets": [start, end]}
        for name, start, end in zip(names, ends, ends[1:], strict=False)
    }
    with files.replacing(path) as partial, partial.open("wb") as file:
        file.write(_header({}, placed))
        sums = {name: _append(file, tensors[name]) for name in names}
        file.seek(0)
        file.write(_header(sums, placed))


def _append(file: BinaryIO, of: Any) -> bytes:
    tensor = of[()].detach().cpu().contiguous()
    assert tensor.nbytes == size_of(of)
    file.write(_bytes(tensor).numpy().data)
    return _sums(tensor)


def size_of(tensor: Any) -> int:
    """Bytes of a tensor, or of a lazy one as :func:`write` takes it."""
    return prod(tensor.shape) * tensor.dtype.itemsize


def _header(sums: dict[str, bytes], placed: dict[str, Any]) -> bytes:
    """The header of a safetensors file; its length does not depend on ``sums``."""
    said = {"__metadata__": {"format": "pt", CHECKSUM: _checksum(sums)}, **placed}
    content = json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode()
    content = content.ljust(-(-len(content) // 8) * 8)
    return len(content).to_bytes(8, "little") + content


@cache
def _kind(dtype: torch.dtype) -> str:
    """The name of a dtype in safetensors."""
    return json.loads(save({"": torch.empty(0, dtype=dtype)})[8:])[""]["dtype"]


def write_divided(path: Path, tensors: Mapping[str, Any], most: int) -> list[Path]:
    """As :func:`write`, into one file if all tensors fit ``most`` bytes, else into shards of at most that.

    A tensor that is larger has a shard of its own. Shards are named, and listed in ``path.index.json``, as transformers
    does. The index is written last, with a checksum of the shards' checksums, so that those of two saves do not mix.

    Returns:
        The files written.
    """
    parts, room = list[dict[str, Any]](), 0
    for name, tensor in tensors.items():
        size = size_of(tensor)
        if not parts or size > room:
            parts.append({})
            room = most
        parts[-1][name] = tensor
        room -= size
    if len(parts) == 1:
        write(path, tensors)
        return [path]
    paths = [path.with_name(f"{path.stem}-{i:05d}-of-{len(parts):05d}{path.suffix}") for i in range(1, len(parts) + 1)]
    for file, part in zip(paths, parts, strict=True):
        write(file, part)
    index = path.with_name(path.name + INDEX)
    said = {"total_size": sum(map(size_of, tensors.values())), CHECKSUM: _of_files(paths)}
    where = {name: file.name for file, part in zip(paths, parts, strict=True) for name in part}
    files.write_json(index, {"metadata": said, "weight_map": dict(sorted(where.items()))})
    return [*paths, index]


def files_of(path: Path, verify: bool = True) -> list[Path]:
    """``path``, or the shards in its folder that it lists if it is an index; CheckpointError for a damaged index.

    With ``verify`` also for shards of another save, if the index has a checksum.
    """
    if not path.name.endswith(INDEX):
        return [path]
    try:
        index = files.read_json(path, {"weight_map": {"*": str}, "metadata?": {f"{CHECKSUM}?": str}})
        parts = {files.inside(path.parent, name, f"{path}: weight_map") for name in index["weight_map"].values()}
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    if not parts or path in parts:
        raise CheckpointError(
            f"{path}: weight_map names {'itself' if parts else 'no file'}; expected the files of the weights"
        )
    for part in parts:
        if not part.is_file():
            raise CheckpointError(f"{path}: weight_map names {part.name!r}, which is missing; copy it too")
    expected = index.get("metadata", {}).get(CHECKSUM)
    if verify and expected is not None and expected != _of_files(parts):
        raise CheckpointError(
            f"{path} does not belong to the files beside it, such as {min(parts).name}; copy all of them, or save again"
        )
    return sorted(parts)


def _of_files(paths: Iterable[Path]) -> str:
    sums = dict[str, bytes]()
    for path in paths:
        with opened(path) as file:
            sums[path.name] = (file.metadata() or {}).get(CHECKSUM, "").encode()
    return _checksum(sums)


def n_bytes(size: int | str) -> int:
    """Bytes in a size, as transformers takes it: a number, or "5GB", "200MiB"; ValueError for anything else."""
    found = re.fullmatch(r"(\d+)\s*(?:([KMGT])(I)?)?B?", str(size).upper())
    n = 0 if found is None else int(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2] or " ")
    if n == 0:
        raise ValueError(f"{size!r} is not a file size; use a number of bytes, or a size such as 5GB or 200MiB")
    return n


def shapes(path: Path) -> dict[str, torch.Size]:
    """Names and shapes in the header of a file; no tensor is read. Errors as :func:`read`."""
    with opened(path) as file:
        return {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def has_checksum(path: Path) -> bool:
    """Whether the file has a checksum for :func:`read` to verify. Errors as :func:`read`."""
    with opened(path) as file:
        return CHECKSUM in (file.metadata() or {})


def read(path: Path, verify: bool = True) -> dict[str, Tensor]:
    """The tensors of a file, verified against its checksum if it has one and ``verify`` is set.

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
    if expected is not None:
        _check_sums(path, expected, sums)
    return tensors


def verify_file(path: Path) -> None:
    """Verify a file against its checksum, if it has one, for others to read. Errors as :func:`read`."""
    with opened(path) as file:
        expected = (file.metadata() or {}).get(CHECKSUM)
        if expected is not None:
            _check_sums(path, expected, {name: _sums(file.get_tensor(name)) for name in file.keys()})  # noqa: SIM118


def _check_sums(path: Path, expected: str, sums: dict[str, bytes]) -> None:
    if expected != _checksum(sums):
        raise CheckpointError(
            f"{path} is damaged: its weights do not match the checksum {expected:.40} that was saved with them; copy "
            f"or save it again (verify=False loads it anyway)"
        )


def check_archive(file: Path | BytesIO) -> bool:
    """Whether ``file`` is a zip archive, as torch.save writes; CheckpointError if it has compressed entries.

    torch.save writes none. They could unpack to any size, and PyTorch would read them as if they were not compressed.
    """
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise CheckpointError("its entries are compressed, which torch.save never does; save it again")
    return True


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a file with safetensors; any error inside the block becomes a CheckpointError that names the file."""
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
    """What the checksum covers of a tensor: dtype, shape, and the column sums of each block of its bytes.

    Sums run at the speed of memory, which no checksum of the standard library does. A changed bit changes one of them,
    data that has moved several. ``tensor`` is copied into ``to`` on the way.
    """
    sums = [f"{tensor.dtype}{tuple(tensor.shape)};".encode()]
    source = _bytes(tensor)
    target = source if to is None else _bytes(to)
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


def _bytes(tensor: Tensor) -> Tensor:
    """(nbytes,) uint8, a view of the memory of a contiguous tensor on the CPU."""
    return tensor.view(-1).view(torch.uint8)
