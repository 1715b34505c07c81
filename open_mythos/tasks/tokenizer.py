"""Lossless tokenizers: bytes, byte-pair encodings trained on the spot, and those of pretrained models.

Token 0 is left to padding by those that are made here; a pretrained model's has its own numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MOST_TOKENS = 1 << 16
FILE = "tokenizer.json"


class Tokenizer:
    """Text by UTF-8 bytes: byte b is token 1 + b.

    Attributes:
        pieces: the bytes that each token stands for; none for padding.
    """

    def __init__(self) -> None:
        self.pieces = [b"", *(bytes([b]) for b in range(256))]

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Tokens of all texts, one after the other, (N,) uint16."""
        return np.frombuffer("".join(texts).encode(), np.uint8) + np.uint16(1)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens; padding stands for nothing, and what is not UTF-8 becomes U+FFFD."""
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", "replace")


class BytePairs(Tokenizer):
    """Byte-level byte-pair encoding, as GPT-2's, of at most ``n_tokens`` tokens, padding included.

    Raises:
        ImportError: naming the extra to install, without ``tokenizers``.
    """

    def __init__(self, n_tokens: int, texts: Sequence[str]) -> None:
        tokenizers = _tokenizers("bpe:N")
        byte_level = tokenizers.pre_tokenizers.ByteLevel
        self._bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        self._bpe.pre_tokenizer = byte_level(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=n_tokens - 1, initial_alphabet=byte_level.alphabet(), show_progress=False
        )
        self._bpe.train_from_iterator(texts, trainer)
        byte_of = _byte_of_character()
        known = self._bpe.get_vocab()
        names = sorted(known, key=known.__getitem__)
        self.pieces = [b"", *(bytes(byte_of[character] for character in name) for name in names)]

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        encoded = self._bpe.encode_batch_fast(texts)
        ids = itertools.chain.from_iterable(one.ids for one in encoded)
        return np.fromiter(ids, np.uint16) + np.uint16(1)


class Pretrained(Tokenizer):
    """That of a pretrained model, from the ``tokenizer.json`` in its directory, with the numbers that it has there.

    Special tokens stand for no bytes, and none are added. A SentencePiece model puts a space before a text.

    Raises:
        ValueError: if there is no such file, or its tokens do not say which bytes they stand for.
        ImportError: naming the extra to install, without ``tokenizers``.
    """

    def __init__(self, directory: str) -> None:
        tokenizers, path = _tokenizers("hf:DIR"), Path(directory) / FILE
        if not path.is_file():
            raise ValueError(f"tokenizer='hf:{directory}', but {path} is missing; give the directory that holds it")
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        special = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        names = {i: name for name, i in self._tokenizer.get_vocab().items()}
        byte_of, decoder = _byte_of_character(), str(self._tokenizer.decoder)
        is_byte_level = "ByteLevel" in decoder
        if not is_byte_level and "ByteFallback" not in decoder:
            raise ValueError(
                f"{path} is neither of byte-level BPE nor of SentencePiece with bytes; use another model's"
            )

        def piece(i: int) -> bytes:
            name = "" if i in special else names.get(i, "")
            if is_byte_level and all(character in byte_of for character in name):
                return bytes(byte_of[character] for character in name)
            is_byte = len(name) == 6 and name.startswith("<0x") and not is_byte_level
            return bytes.fromhex(name[3:5]) if is_byte else name.replace("\u2581", " ").encode()

        self.pieces = [piece(i) for i in range(max(names) + 1)]

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Tokens of all texts, one after the other, (N,) uint16, or uint32 where that is too small."""
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = itertools.chain.from_iterable(one.ids for one in encoded)
        return np.fromiter(ids, np.uint16 if len(self.pieces) <= MOST_TOKENS else np.uint32)


def tokenizer(kind: str, texts: Sequence[str]) -> Tokenizer:
    """The tokenizer called ``"bytes"``, ``"bpe:N"`` with its N tokens trained on ``texts``, or ``"hf:DIR"``.

    Raises:
        ValueError: for any other name, an N that does not do, or a DIR without a tokenizer.
    """
    if kind == "bytes":
        return Tokenizer()
    name, _, count = kind.partition(":")
    if name == "hf" and count:
        return Pretrained(count)
    if name != "bpe" or not count.isdecimal() or not 257 <= int(count) <= MOST_TOKENS:
        raise ValueError(f"tokenizer={kind!r}; use 'bytes', or 'bpe:N' with N from 257 to {MOST_TOKENS}, or 'hf:DIR'")
    return BytePairs(int(count), texts)


def _tokenizers(kind: str) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(f"tokenizer={kind!r} needs tokenizers: pip install 'open-mythos[tasks]'") from error
    return tokenizers


def _byte_of_character() -> dict[str, int]:
    """GPT-2 writes printable Latin-1 bytes as themselves, and the others as U+0100 onwards, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
