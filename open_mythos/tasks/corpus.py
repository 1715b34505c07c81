"""Sources of text: the standard library's own code, local files, or a Hugging Face dataset."""

import codecs
import glob
import hashlib
import math
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from open_mythos.fields import must
from open_mythos.install import find_hub, missing

PIECE = 4096  # bytes of a document where one single text is the whole corpus
STREAMED = 1 << 26  # bytes read of a streamed dataset if max_bytes is 0
WAYS = "'stdlib', 'hf:NAME', or the path or glob of text files"
_ENDS = [re.compile(end) for end in (rb"[.!?]\s", rb"\s", rb"(?=[^\x80-\xbf])|$")]
"""Where a long line may be cut, best first: behind a sentence, behind a word, before a character."""
_UTF_16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE
_NOT_LIBRARY = {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__"}


@lru_cache(maxsize=4)
def documents(source: str, max_bytes: int) -> tuple[str, ...]:
    """All documents of :func:`stream`, cached for the life of the process."""
    return tuple(stream(source, max_bytes))


def stream(source: str, max_bytes: int) -> Iterator[str]:
    """Yield the documents of a corpus, always in the same order.

    A single document, from which nothing could be held out, is cut into documents of about ``PIECE`` bytes: at line
    ends, or in a long line after a sentence or a word. Documents of white space alone are left out.

    Args:
        source: ``"stdlib"``, the modules of the running Python without tests; a file; a directory or glob, whose text
            files are the documents; or ``"hf:NAME"`` or ``"hf:NAME:CONFIG"``, the training part of a Hugging Face
            dataset, streamed. NAME may be a local folder of JSON lines or Parquet.
        max_bytes: where to stop; the last document is cut there. 0: at the end, or of a dataset after ``STREAMED``.

    Raises:
        ValueError: if there is nothing to read at ``source``.
        ImportError: naming the extra to install, for ``hf:`` without ``datasets``.
    """
    _check_name(source)
    path, streamed = Path(source).expanduser(), source.startswith("hf:")
    if streamed:
        contents = _hugging_face(source)
    elif source == "stdlib":
        contents = _texts(_library_modules(), max_bytes)
    elif path.is_file():
        contents = _file(path)
    else:
        files = _files(source)
        must(bool(files), f"source={source!r} matches no text file; use {WAYS}")
        contents = _texts(files, max_bytes)
    found = _within(contents, max_bytes or (STREAMED if streamed else math.inf))
    first = next(found, b"")
    must(first != b"", f"source={source!r} contains no text; use {WAYS}")
    second = next(found, b"")
    for document in chain((first, second), found) if second else _pieces(BytesIO(first)):
        yield document.decode("utf-8", "replace")


def state(source: str) -> list[Any]:
    """State that changes when the documents of a source may have: names, sizes and times of its files."""
    _check_name(source)
    if source == "stdlib":
        return [sys.version]
    name = source.split(":", 2)[1] if source.startswith("hf:") else source
    return [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in _files(name)]


def _check_name(source: str) -> None:
    must(source.strip() != "", f"source={source!r} is empty; use {WAYS}")
    must(
        not source.startswith("hf:") or source.split(":")[1].strip() != "",
        f"source={source!r} names no dataset; use {WAYS}",
    )


def size(source: str, max_bytes: int) -> int:
    """Approximate number of bytes that :func:`stream` yields."""
    paths = _library_modules() if source == "stdlib" else [] if source.startswith("hf:") else _files(source)
    there = sum(path.stat().st_size for path in paths) if paths else STREAMED
    return min(there, max_bytes or there)


def held_out(document: str) -> bool:
    """Whether a document is held out: one in 16, by a hash of its content, so independently of the others."""
    return hashlib.blake2b(document.encode(), digest_size=1).digest()[0] < 256 // 16


def _within(documents: Iterator[bytes], left: float) -> Iterator[bytes]:
    """Documents within the first ``left`` bytes that are not empty or white space; the last one is cut there."""
    for document in documents:
        if (cut := document if len(document) <= left else document[: int(left)]).strip():
            yield cut
        left -= len(document)
        if left <= 0:
            return


def _files(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_file():  # though its name may look like a glob
        return [path]
    paths = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    return sorted(path for path in paths if path.is_file())


def _library_modules() -> list[Path]:
    found = []
    for folder, subfolders, files in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = [name for name in subfolders if name not in _NOT_LIBRARY]
        # _sysconfigdata is written by the build and differs from machine to machine
        found += [Path(folder, name) for name in files if name.endswith(".py") and not name.startswith("_sysconfig")]
    return sorted(found)


def _texts(paths: list[Path], max_bytes: int) -> Iterator[bytes]:
    """Content of the text files among ``paths``, of each no more than is used."""
    for path in paths:
        with path.open("rb") as file:
            if b"\0" not in (content := file.read(PIECE)):
                content += file.read(max_bytes or -1)
            if content.startswith(_UTF_16) or b"\0" not in content:
                _check_text(path, content)
                yield content


def _file(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for piece in _pieces(file):
            must(b"\0" not in piece, f"source={str(path)!r} is not a text file; use {WAYS}")
            _check_text(path, piece)
            yield piece


def _check_text(path: Path, content: bytes) -> None:
    """ValueError unless ``content`` is UTF-8; its last character may be cut."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(content)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"source: {path} is not UTF-8 ({error.reason} at {error.object[error.start : error.end]!r}); convert it, "
            f"as with iconv -f ENCODING -t UTF-8, or leave it out"
        ) from None


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(PIECE):
        if not piece.endswith(b"\n"):
            piece += file.readline(PIECE)
            if len(piece) == 2 * PIECE and not piece.endswith(b"\n"):
                cut = next(found.end() for end in _ENDS if (found := end.search(piece, PIECE)))
                file.seek(cut - len(piece), os.SEEK_CUR)
                piece = piece[:cut]
        yield piece


def _hugging_face(source: str) -> Iterator[bytes]:
    _, name, *config = source.split(":", 2)
    if not Path(name).exists():
        find_hub()
    try:
        import datasets
    except ImportError as error:
        raise missing(f"source={source!r} needs datasets", "tasks") from error
    try:
        for row in datasets.load_dataset(name, *config, split="train", streaming=True):
            if "text" not in row:
                raise ValueError(f"it has no column 'text', only {', '.join(row)}")
            if not isinstance(row["text"], str | None):
                raise ValueError(f"its column 'text' holds a {type(row['text']).__name__}; expected strings")
            yield (row["text"] or "").encode()
    except Exception as error:  # of datasets, the hub, or the network: there is no common base
        why = "one of its rows does not fit into memory" if isinstance(error, MemoryError) else error
        raise ValueError(
            f"cannot read source={source!r}: {why}; check the name and the network, or use a path"
        ) from error
