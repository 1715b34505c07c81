"""Tokens of a corpus on disk: made once, memory-mapped after, so that its size does not matter and a run can go on.

::

    CACHE/text/KEY/train.bin, held_out.bin   an <eos>, then each document and the <eos> behind it; little-endian
    CACHE/text/KEY/tokenizer.json
    CACHE/text/KEY/index.json                counts, and a checksum of train.bin

KEY is made of everything that decides the tokens. CACHE is ``~/.cache/open_mythos``, or what the environment variable
``OPEN_MYTHOS_CACHE`` says; it may be removed at any time.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from open_mythos.fields import must
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
    said = file.read_text() if file.is_file() else kind
    key = [_VERSION, source, corpus.state(source), said, max_bytes]
    home = _cache() / hashlib.blake2b(json.dumps(key).encode(), digest_size=12).hexdigest()
    if not (home / "index.json").is_file():
        home.parent.mkdir(parents=True, exist_ok=True)
        # Made under another name, and moved when whole: nobody sees half of it, and of two makers one wins.
        with tempfile.TemporaryDirectory(dir=home.parent, prefix="making-", ignore_cleanup_errors=True) as making:
            _make(Path(making, "tokens"), source, kind, max_bytes)
            with contextlib.suppress(OSError):  # it is there: the other maker was first
                Path(making, "tokens").rename(home)
    made = tokenizer.load(home)
    parts = {name: Part(**part) for name, part in json.loads((home / "index.json").read_text()).items()}
    return Store(made, {name: np.memmap(home / f"{name}.bin", made.dtype, "r") for name in PARTS}, parts)


def _cache() -> Path:
    chosen = os.environ.get("OPEN_MYTHOS_CACHE")
    return (Path(chosen) if chosen else Path.home() / ".cache" / "open_mythos") / "text"


class _Writer:
    """Appends documents to the file of a part, which begins with an end."""

    def __init__(self, file: BinaryIO, end: np.ndarray) -> None:
        self.file, self.end, self.part = file, end, Part()
        self._write(end)

    def add(self, document: str, tokens: np.ndarray) -> None:
        self._write(np.concatenate([tokens, self.end]))
        self.part.documents += 1
        self.part.bytes += len(document.encode())

    def _write(self, tokens: np.ndarray) -> None:
        content = tokens.astype(tokens.dtype.newbyteorder("<")).tobytes()
        self.file.write(content)
        self.part.tokens += len(tokens)
        self.part.crc32 = zlib.crc32(content, self.part.crc32)


def _make(home: Path, source: str, kind: str, max_bytes: int) -> None:
    made = tokenizer.tokenizer(kind, _to_train_on(source, max_bytes), ends=True)
    must(made.eos is not None, f"tokenizer={kind!r} has no token that ends documents; name it <eos>, or eos_token")
    home.mkdir()
    end, waiting = np.array([made.eos], made.dtype), None
    with (home / "train.bin").open("wb") as train_file, (home / "held_out.bin").open("wb") as held_out_file:
        train, held_out = _Writer(train_file, end), _Writer(held_out_file, end)
        for documents in _batches(corpus.stream(source, max_bytes)):
            for document, tokens in zip(documents, made.encode_each(documents), strict=True):
                if corpus.held_out(document):
                    held_out.add(document, tokens)
                    continue
                if waiting is not None:
                    train.add(*waiting)
                waiting = document, tokens  # the last is held out if no other is
        if waiting is not None:
            (train if held_out.part.documents else held_out).add(*waiting)
    parts = {"train": train.part, "held_out": held_out.part}
    for name, part in parts.items():
        must(part.documents > 0, f"source={source!r} has too few documents for a {name} part; use more text")
    made.save(home)
    (home / "index.json").write_text(json.dumps({name: asdict(part) for name, part in parts.items()}, indent=1) + "\n")


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
