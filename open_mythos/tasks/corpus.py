"""Where text comes from: the standard library's own sources, local files, or a Hugging Face dataset."""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

PIECE = 4096
"""Bytes of a document where one single file is the whole corpus."""

_NOT_LIBRARY = {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__"}


@lru_cache(maxsize=4)
def documents(source: str, max_bytes: int) -> tuple[str, ...]:
    """The documents of a corpus, always in the same order; kept for the life of the process.

    Args:
        source: ``"stdlib"``, the modules of the running Python without tests; a file, which is cut at line ends into
            documents of ``PIECE`` bytes; a directory or glob, whose text files are the documents; or
            ``"hf:NAME"`` or ``"hf:NAME:CONFIG"``, the training part of a Hugging Face dataset, streamed.
        max_bytes: where to stop; the last document is cut there.

    Raises:
        ValueError: if there is nothing to read at ``source``.
        ImportError: naming the extra to install, for ``hf:`` without ``datasets``.
    """
    found, left = [], max_bytes
    for document in _read(source):
        found.append(document[:left].decode("utf-8", "replace"))
        left -= len(document)
        if left <= 0:
            break
    if not found:
        raise ValueError(f"source={source!r} holds no text; use 'stdlib', 'hf:NAME', or the path or glob of text files")
    return tuple(found)


def held_out(document: str) -> bool:
    """Whether a document is kept from training: one in 16, decided by its own content and so never by what stands
    beside it."""
    return hashlib.blake2b(document.encode(), digest_size=1).digest()[0] < 256 // 16


def _read(source: str) -> Iterator[bytes]:
    if source.startswith("hf:"):
        return _hugging_face(source)
    if source == "stdlib":
        return _texts(_library_modules())
    path = Path(source).expanduser()
    if path.is_file():
        return _pieces(path.read_bytes())
    paths = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    return _texts(sorted(path for path in paths if path.is_file()))


def _library_modules() -> list[Path]:
    found = []
    for folder, subfolders, files in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = [name for name in subfolders if name not in _NOT_LIBRARY]
        # _sysconfigdata is written by the build and differs from machine to machine
        found += [Path(folder, name) for name in files if name.endswith(".py") and not name.startswith("_sysconfig")]
    return sorted(found)


def _texts(paths: list[Path]) -> Iterator[bytes]:
    for path in paths:
        content = path.read_bytes()
        if content and b"\0" not in content:
            yield content


def _pieces(content: bytes) -> Iterator[bytes]:
    while content:
        end = content.find(b"\n", PIECE - 1) + 1 or len(content)
        yield content[:end]
        content = content[end:]


def _hugging_face(source: str) -> Iterator[bytes]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"source={source!r} needs datasets: pip install 'open-mythos[tasks]'") from error
    _, name, *config = source.split(":", 2)
    try:
        for row in datasets.load_dataset(name, *config, split="train", streaming=True):
            if not isinstance(row.get("text"), str):
                raise ValueError(f"it has no column 'text', only {', '.join(row)}")
            yield row["text"].encode()
    except Exception as error:  # of datasets, the hub, or the network: there is no common base
        raise ValueError(f"cannot read source={source!r}: {error}; check name and network, or use a path") from error
