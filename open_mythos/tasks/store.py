"""Tokens of a corpus on disk, in ``text`` of :func:`open_mythos.install.cache_dir`.

Made once and memory-mapped after. A part's file is an ``<eos>``, then each document and its ``<eos>``, little-endian.
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from open_mythos import files
from open_mythos.fields import must
from open_mythos.install import cache_dir
from open_mythos.tasks import corpus, tokenizer
from open_mythos.tasks.tokenizer import Tokenizer

PARTS = ("train", "held_out")
_VERSION = 2
_TRAINED_ON = 1 << 24  # bytes of text that a tokenizer is trained on
_AT_ONCE = 1 << 20  # characters that are tokenised together


@dataclass
class Part:
    """Of one part of a corpus: its documents, their bytes, its tokens (each ``<eos>`` included), and their CRC-32."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    crc32: int = 0


@dataclass
class Store:
    """A tokenised corpus: its tokenizer, and for each of ``PARTS`` the tokens, (N,), and what they are."""

    tokenizer: Tokenizer
    tokens: dict[str, np.ndarray]
    parts: dict[str, Part]


def tokenised(source: str, kind: str, max_bytes: int) -> Store:
    """The tokens of a corpus, from disk if they are there.

    Held out is one document in 16, decided by its content, or the last if that leaves none.

    Args:
        source, max_bytes: see :func:`open_mythos.tasks.corpus.stream`.
        kind: see :func:`open_mythos.tasks.tokenizer.tokenizer`; one that ends documents.

    Raises:
        ValueError: for a source without two documents, or a tokenizer without a token for their end.
        ImportError: naming the extra to install, if a source or tokenizer needs a package that is not there.
        OSError: if there is no room.
    """
    file = Path(kind, tokenizer.FILE)
    said = files.read_text(file) if file.is_file() else kind
    key = [_VERSION, source, corpus.state(source), said, max_bytes]
    home = cache_dir() / "text" / hashlib.blake2b(json.dumps(key).encode(), digest_size=12).hexdigest()
    try:
        return _opened(home)
    except (OSError, ValueError):  # it is not there, or damaged
        shutil.rmtree(home, ignore_errors=True)
        home.parent.mkdir(parents=True, exist_ok=True)
        # Made under another name, and moved when whole: nobody sees half of it, and of two makers one wins.
        with tempfile.TemporaryDirectory(dir=home.parent, prefix="making-", ignore_cleanup_errors=True) as making:
            try:
                _make(Path(making, "tokens"), source, kind, max_bytes)
            except OSError as error:
                raise error if error.filename else OSError(error.errno, error.strerror, str(home)) from error
            with contextlib.suppress(OSError):  # it is there: the other maker was first
                Path(making, "tokens").rename(home)
    return _opened(home)


def _opened(home: Path) -> Store:
    """What :func:`_make` has made; ValueError or OSError if it is not there as it was made."""
    index = files.read_json(home / "index.json", {name: {field.name: int for field in fields(Part)} for name in PARTS})
    made, parts = tokenizer.load(home), {name: Part(**index[name]) for name in PARTS}
    tokens: dict[str, np.ndarray] = {name: np.memmap(home / f"{name}.bin", made.dtype, "r") for name in PARTS}
    for name, part in parts.items():
        found = 0
        for start in range(0, len(tokens[name]), _AT_ONCE):
            found = zlib.crc32(tokens[name][start : start + _AT_ONCE].data, found)
        must(found == part.crc32, f"{home / name}.bin is damaged")
    return Store(made, tokens, parts)


def _make(home: Path, source: str, kind: str, max_bytes: int) -> None:
    made = tokenizer.tokenizer(kind, _to_train_on(source, max_bytes), ends=True)
    must(made.eos is not None, f"tokenizer={kind!r} has no token that ends documents; name it <eos>, or eos_token")
    home.mkdir()
    end, parts, waiting = np.array([made.eos], made.dtype), {name: Part() for name in PARTS}, None

    def write(name: str, tokens: np.ndarray, document: str | None = None) -> None:
        content, part = tokens.astype(tokens.dtype.newbyteorder("<")).tobytes(), parts[name]
        opened[name].write(content)
        part.tokens += len(tokens)
        part.crc32 = zlib.crc32(content, part.crc32)
        if document is not None:
            part.documents += 1
            part.bytes += len(document.encode())

    with contextlib.ExitStack() as stack:
        opened = {name: stack.enter_context((home / f"{name}.bin").open("wb")) for name in PARTS}
        for name in PARTS:
            write(name, end)
        for documents in _batches(corpus.stream(source, max_bytes)):
            for document, tokens in zip(documents, made.encode_each(documents), strict=True):
                ended = np.concatenate([tokens, end])
                if corpus.held_out(document):
                    write("held_out", ended, document)
                    continue
                if waiting is not None:
                    write("train", *waiting)
                waiting = ended, document  # the last is held out if no other is
        if waiting is not None:
            write("train" if parts["held_out"].documents else "held_out", *waiting)
    for name, part in parts.items():
        must(part.documents > 0, f"source={source!r} has too few documents for a {name} part; use more text")
    made.save(home)
    files.write_json(home / "index.json", {name: asdict(part) for name, part in parts.items()})


def _to_train_on(source: str, max_bytes: int) -> Iterator[str]:
    left = _TRAINED_ON
    for document in corpus.stream(source, max_bytes):
        if not corpus.held_out(document):
            yield document
            left -= len(document)
            if left <= 0:
                return


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch, size = list[str](), 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= _AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
