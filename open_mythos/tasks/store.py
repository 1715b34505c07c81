"""Tokenised text in a folder: shards, which processes memory-map, and an index.

``tokens.json`` lists the shards of each part in order, with their documents, bytes, tokens and checksums, and
identifies the tokenizer beside it. A part is an ``<eos>``, then each document and its ``<eos>``, little-endian; a shard
may end anywhere. Folders are made by :func:`open_mythos.tasks.filling.fill`: by ``mythos tokenize`` at the path given,
and in training in ``text`` of :func:`open_mythos.install.cache_dir`.
"""

import hashlib
import mmap
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from open_mythos import files
from open_mythos.fields import must
from open_mythos.tasks import tokenizer
from open_mythos.tasks.tokenizer import Tokenizer

PARTS = ("train", "held_out")
INDEX = "tokens.json"
READ_THROUGH = 1 << 30  # bytes of tokens up to which opening verifies checksums, and not only sizes
_MAPPED = 64  # maximum number of shards that are mapped at one time
_AT_ONCE = 1 << 20
AGAIN = "tokenise the text again (mythos tokenize)"


@dataclass
class Part:
    """Numbers of documents, their bytes and their tokens (each ``<eos>`` included), and a CRC-32.

    The checksum of a shard is that of its part up to the shard's end, so the last one's is the whole part's.
    """

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    crc32: int = 0


@dataclass
class Shard(Part):
    """A file of a part."""

    file: str = ""


class Tokens:
    """Tokens in several files, concatenated, read like an array (N,): by slices, and by arrays of indices.

    A process maps the files that it reads, and releases pages once read: only the system's page cache, which processes
    share, keeps them.

    Args:
        shards: files, and the number of tokens in each.
        dtype: of a token.
    """

    def __init__(self, shards: Sequence[tuple[Path, int]], dtype: Any) -> None:
        self.shards, self.dtype = [(path, n) for path, n in shards if n], np.dtype(dtype).newbyteorder("<")
        self._ends = np.cumsum([0, *(n for _, n in self.shards)])
        self._map = lru_cache(_MAPPED)(self._mapped)

    def __reduce__(self) -> Any:
        return Tokens, (self.shards, self.dtype)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __iter__(self) -> Iterator[int]:
        for start in range(0, len(self), _AT_ONCE):
            yield from self[start : start + _AT_ONCE].tolist()

    def __getitem__(self, where: slice | np.ndarray) -> np.ndarray:
        if isinstance(where, slice):
            where = np.arange(*where.indices(len(self)))
        found, shards = np.empty(where.shape, self.dtype), np.searchsorted(self._ends, where, "right") - 1
        for i in np.unique(shards):
            mapped, here = self._map(int(i)), shards == i
            found[here] = np.frombuffer(mapped, self.dtype)[where[here] - self._ends[i]]
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)
        return found

    def _mapped(self, i: int) -> mmap.mmap:
        path, n = self.shards[i]
        with files.opened(path) as file:
            _check_size(path, os.fstat(file.fileno()).st_size, n * self.dtype.itemsize)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@dataclass
class Store:
    """A tokenised text: its folder, its tokenizer, and for each of ``PARTS`` the tokens, (N,), and their numbers."""

    folder: Path
    tokenizer: Tokenizer
    tokens: dict[str, Tokens]
    parts: dict[str, Part]


def is_store(folder: str | Path) -> bool:
    """Whether ``folder`` holds tokens (a store), not text."""
    return Path(folder, INDEX).is_file()


def opened(folder: Path, read_through: int = READ_THROUGH) -> Store:
    """Open the tokens in a folder.

    Sizes of all shards are compared with the index, and checksums too if there are at most ``read_through`` bytes.

    Raises:
        ValueError: naming the file, for a shard that is truncated, damaged, or outside the folder, a tokenizer that is
            not that of the tokens, or an invalid index.
        FileNotFoundError: for a shard that is missing.
    """
    where = folder / INDEX
    index, made = read_index(folder), tokenizer.load(folder)
    other = (
        f"{folder / tokenizer.FILE} is not the tokenizer that made the tokens beside it; restore that one, or {AGAIN}"
    )
    must(identity(made) == index["tokenizer"], other)
    known = 0 <= index["eos"] < len(made.pieces) and made.dtype.__name__ == index["dtype"]
    must(
        known,
        f"{where} has eos={index['eos']} and dtype={index['dtype']!r:.20}, unlike its tokenizer; {AGAIN}",
    )
    made.eos = index["eos"]
    width, tokens, parts = np.dtype(made.dtype).itemsize, dict[str, Tokens](), dict[str, Part]()
    for name in PARTS:
        shards = index[name]
        paths = [files.inside(folder, shard.file, str(where)) for shard in shards]
        for path, shard in zip(paths, shards, strict=True):
            _check_size(path, path.stat().st_size, shard.tokens * width)
        tokens[name] = Tokens([(path, shard.tokens) for path, shard in zip(paths, shards, strict=True)], made.dtype)
        parts[name] = total(shards)
    if sum(part.tokens for part in parts.values()) * width <= read_through:
        for name in PARTS:
            for before, shard in pairwise([Shard(), *index[name]]):
                check_content(folder, shard, before)
    return Store(folder, made, tokens, parts)


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a folder, with the shards of each part."""
    shard = {field.name: field.type for field in fields(Shard)}
    shape = {"from": str, "tokenizer": str, "eos": int, "dtype": str, **{name: [shard] for name in PARTS}}
    index: dict[str, Any] = files.read_json(folder / INDEX, shape)
    return index | {name: [Shard(**{key: one[key] for key in shard}) for one in index[name]] for name in PARTS}


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write the index that :func:`read_index` reads, atomically."""
    files.write_json(folder / INDEX, index | {name: [asdict(shard) for shard in index[name]] for name in PARTS})


def total(parts: Sequence[Part]) -> Part:
    """The sums over consecutive parts or shards, with the checksum of the last one."""
    sums = {name: sum(getattr(part, name) for part in parts) for name in ("documents", "bytes", "tokens")}
    return Part(**sums, crc32=parts[-1].crc32 if parts else 0)


def identity(made: Tokenizer) -> str:
    """A hash that identifies a tokenizer."""
    return hashlib.blake2b(made.to_json().encode(), digest_size=12).hexdigest()


def check_content(folder: Path, shard: Shard, before: Part) -> None:
    """Raise ValueError if the checksum of a shard, continued from the one ``before``, differs from the index."""
    path = folder / shard.file
    must(checksum(path, before.crc32) == shard.crc32, f"{path} is damaged: its checksum does not match; {AGAIN}")


def checksum(path: Path, crc: int = 0) -> int:
    """The CRC-32 of a file's content, continued from ``crc``."""
    with files.opened(path) as file:
        while content := file.read(_AT_ONCE):
            crc = zlib.crc32(content, crc)
    return crc


def _check_size(path: Path, found: int, expected: int) -> None:
    must(found == expected, f"{path} has {found:,} bytes and should have {expected:,}: it is damaged; {AGAIN}")
