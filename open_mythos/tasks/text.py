"""Next-token prediction on text that is on every machine, on your own, or from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from open_mythos.fields import choice, size, text
from open_mythos.tasks.base import Batch, Task
from open_mythos.tasks.corpus import documents, held_out
from open_mythos.tasks.tokenizer import Tokenizer, tokenizer


@dataclass
class Text(Task):
    """Windows of a corpus; at each token the next one is to be said. Difficulty is the number of tokens.

    ``source`` is ``"stdlib"`` (the sources of Python's standard library, the same on one version of Python), a file,
    a directory, a glob, or ``"hf:NAME[:CONFIG]"``; see :func:`open_mythos.tasks.corpus.documents`. ``tokenizer`` is
    ``"bytes"``, ``"bpe:N"``, trained on the training part, or ``"hf:DIR"``, a pretrained model's. ``split`` is
    ``"train"`` or ``"held_out"``: one whole document in 16, whichever way the corpus grows. Documents follow each other
    without a mark between.

    Raises:
        ValueError: for a source without text or a split without documents.
        ImportError: naming the extra to install, if a source or tokenizer needs a package that is not there.
    """

    name = "text"
    unit = "tokens"
    source: str = text("stdlib")
    tokenizer: str = text("bytes")
    split: str = choice("train", "train", "held_out")
    max_bytes: int = size(1 << 24)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._tokenizer, tokens = _tokens(self.source, self.tokenizer, self.max_bytes)
        self._tokens = tokens[self.split]
        if len(self._tokens) < 2:
            raise ValueError(f"source={self.source!r} has too few documents for a {self.split} part; use more text")
        self.most = len(self._tokens) - 1
        self.vocab = ("<pad>", *(repr(piece)[2:-1] for piece in self._tokenizer.pieces[1:]))
        self.chance = 1 / self.vocab_size
        self._bytes = torch.tensor([len(piece) for piece in self._tokenizer.pieces])

    @property
    def tokens(self) -> np.ndarray:
        """All tokens of the split, (N,) uint16, or uint32 for a large vocabulary."""
        return self._tokens

    def length(self, difficulty: int) -> int:
        return difficulty

    def batch(self, n: int, difficulty: int, generator: torch.Generator | None = None) -> Batch:
        self.check(difficulty)
        return self._windows(torch.randint(0, len(self._tokens) - difficulty, (n,), generator=generator), difficulty)

    def windows(self, length: int, n: int) -> Batch:
        """``n`` windows of ``length`` tokens, evenly spaced over the split and always the same, to evaluate on.

        Raises:
            ValueError: if the split is shorter than one window.
        """
        self.check(length)
        last = len(self._tokens) - length - 1
        return self._windows(torch.arange(n) * last // max(n - 1, 1), length)

    def bytes_of(self, targets: Tensor) -> Tensor:
        """How many bytes each target stands for, in the shape of ``targets``; 0 where none is scored.

        Bits per byte are the summed cross-entropy in bits over the sum of these.
        """
        return self._bytes.to(targets.device)[targets.clamp(min=0)]

    def encode(self, text: str) -> list[int]:
        """Tokens of ``text``."""
        return self._tokenizer.encode([text]).tolist()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, the inverse of :meth:`encode`."""
        return self._tokenizer.decode(ids)

    def render(self, ids: Sequence[int]) -> str:
        return self.decode(ids)

    def _windows(self, starts: Tensor, length: int) -> Batch:
        where = starts[:, None] + torch.arange(length + 1)
        tokens = torch.from_numpy(self._tokens[where.numpy()].astype(np.int64))
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


@lru_cache(maxsize=4)
def _tokens(source: str, kind: str, max_bytes: int) -> tuple[Tokenizer, dict[str, np.ndarray]]:
    """The tokenizer of a corpus and the tokens of its two parts, kept for the life of the process."""
    parts: dict[str, list[str]] = {"train": [], "held_out": []}
    for document in documents(source, max_bytes):
        parts["held_out" if held_out(document) else "train"].append(document)
    made = tokenizer(kind, parts["train"])
    return made, {part: made.encode(texts) for part, texts in parts.items()}
