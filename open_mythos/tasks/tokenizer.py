"""Lossless tokenizers: bytes, and byte-pair encodings trained on the spot. Token 0 is left to padding."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

MOST_TOKENS = 1 << 16


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
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError("tokenizer='bpe:N' needs tokenizers: pip install 'open-mythos[tasks]'") from error
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


def tokenizer(kind: str, texts: Sequence[str]) -> Tokenizer:
    """The tokenizer called ``"bytes"``, or ``"bpe:N"`` with its N tokens trained on ``texts``.

    Raises:
        ValueError: for any other name, or an N that does not do.
    """
    if kind == "bytes":
        return Tokenizer()
    name, _, count = kind.partition(":")
    if name != "bpe" or not count.isdecimal() or not 257 <= int(count) <= MOST_TOKENS:
        raise ValueError(f"tokenizer={kind!r}; use 'bytes', or 'bpe:N' with N from 257 to {MOST_TOKENS}")
    return BytePairs(int(count), texts)


def _byte_of_character() -> dict[str, int]:
    """GPT-2 writes printable Latin-1 bytes as themselves, and the others as U+0100 onwards, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
