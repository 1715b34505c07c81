"""Next-token prediction on text: Python's standard library, your own files, or a Hugging Face dataset."""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import count, pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from open_mythos.fields import choice, flag, must, size, text
from open_mythos.tasks.base import UNSCORED, Batch, Task
from open_mythos.tasks.corpus import documents, held_out
from open_mythos.tasks.filling import tokenised
from open_mythos.tasks.mixture import Deal, parsed
from open_mythos.tasks.store import PARTS, Part, Store, Tokens, is_store, total
from open_mythos.tasks.tokenizer import Tokenizer, tokenizer


@dataclass
class Text(Task):
    """Windows of a corpus; the target at each token is the next one. Difficulty is the number of tokens.

    ``source`` is ``"stdlib"`` (the sources of Python's standard library, the same on one version of Python), a file,
    a directory, a glob, or ``"hf:NAME[:CONFIG]"``; see :func:`open_mythos.tasks.corpus.stream`. ``tokenizer`` is
    ``"bytes"``, ``"bpe:N"``, trained on the training part, or a folder with a ``tokenizer.json``. ``split`` is
    ``"train"`` or ``"held_out"``: one whole document in 16, the same ones however the corpus grows. ``max_bytes``:
    where to stop reading; 0: at the end, or after 64 MB of a streamed dataset.

    With ``separate``, documents are packed with an ``<eos>`` before each one and after its last token, and tokens do
    not attend to other documents, which ``Batch.valid`` numbers. Tokens are then on disk
    (:mod:`open_mythos.tasks.store`) and read row by row (:meth:`rows`). ``source`` may also be a folder of such tokens,
    with the same folder as tokenizer, or several sources with weights (:func:`~open_mythos.tasks.mixture.parsed`);
    ``"bpe:N"`` is trained on the first one. Without ``separate``, documents are concatenated without a separator.

    Attributes:
        eos: the token that ends a document, None without ``separate``.
        tokens: all tokens of the split, (N,) uint16 or uint32; with ``separate``, with ``<eos>`` around each document,
            in files (:class:`~open_mythos.tasks.store.Tokens`), one source after the other.

    Raises:
        ValueError: for a source without text or a split without documents.
        ImportError: naming the extra to install, if a source or tokenizer needs a package that is not installed.
    """

    name = "text"
    unit = "tokens"
    source: str = text("stdlib")
    tokenizer: str = text("bytes")
    split: str = choice("train", "train", "held_out")
    max_bytes: int = size(0, minimum=0)
    separate: bool = flag(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.store: Store | None = None
        one = len(parsed(self.source)) == 1 and not is_store(self.source)
        must(one or self.separate, f"source={self.source!r} can only be read as separate documents; use separate=true")
        if self.separate:
            self._weights = dict(parsed(self.source))
            stores = _opened(self._weights, self.tokenizer, self.max_bytes)
            self.store = _together(stores)
            self._tokenizer, sizes = self.store.tokenizer, [len(store.tokens[self.split]) for store in stores]
            self.tokens: np.ndarray | Tokens = self.store.tokens[self.split]
        else:
            self._tokenizer, tokens = _tokens(self.source, self.tokenizer, self.max_bytes)
            self.tokens, self._weights = tokens[self.split], {self.source: Fraction(1)}
            sizes = [len(self.tokens)]
        # where each source begins in the tokens, and where the last one ends
        self._edges = np.cumsum([0, *sizes]).tolist()
        self.eos = self._tokenizer.eos if self.separate else None
        self._deals = dict[int, Deal]()
        if len(self.tokens) < 2:
            raise ValueError(f"source={self.source!r} has too few documents for its {self.split} part; use more text")
        self.most = None if self.separate else len(self.tokens) - 1  # a row that is not full is padded
        first = "<pad>" if self.eos is None else "<eos>"
        self.vocab = tuple(repr(piece)[2:-1] if piece else first for piece in self._tokenizer.pieces)
        self.chance = 1 / self.vocab_size
        self._bytes = torch.tensor([len(piece) for piece in self._tokenizer.pieces])

    def batch(self, n: int, difficulty: int, generator: torch.Generator | None = None) -> Batch:
        last = max(1, len(self.tokens) - difficulty)
        return self._windows(torch.randint(0, last, (n,), generator=generator), difficulty)

    def n_rows(self, length: int) -> int:
        """Number of rows of ``length`` tokens in the split; the last row of each source may be padded."""
        return sum(self._deal(length).n_rows)

    def rows(self, which: Iterable[int], length: int, seed: int = 0, share: slice | None = None) -> Batch:
        """Rows at some places of an endless sequence: every row of the split in random order, epoch after epoch.

        In the text, each row begins where the one before ends, so that each token of the split is a target once in
        ``n_rows(length)`` rows, the first tokens of documents and rows and the ends included. With several sources each
        has its share of about any thousand rows, and epochs of its own.

        Args:
            which: places in the sequence; a row depends on its place, ``length`` and ``seed`` alone, so that processes
                may each read their own.
            length: tokens of a row.
            seed: of the random orders.
            share: which of these places to read; ``n_scored`` then counts all of them.
        """
        starts, ends = self._spans(which, length, seed)
        if share is None:
            return self._windows(starts, length, ends)
        n_scored = int((ends - starts - 1).clamp(max=length).sum())
        return replace(self._windows(starts[share], length, ends[share]), n_scored=n_scored)

    def seen(self, rows: int, length: int, seed: int = 0) -> list[tuple[str, int, float]]:
        """For each source: its name, and how many tokens and epochs of it are in the first ``rows`` rows."""
        found, deal = [], self._deal(length)
        for i, (name, n) in enumerate(zip(self._weights, deal.seen(rows, seed), strict=True)):
            epochs, rest = divmod(n, deal.n_rows[i])
            tokens = self._edges[i + 1] - self._edges[i] - 1
            found.append((name, epochs * tokens + min(tokens, rest * length), n / deal.n_rows[i]))
        return found

    def _deal(self, length: int) -> Deal:
        """The assignment of sources and rows to places, for rows of ``length`` tokens."""
        self.check(length)
        if length not in self._deals:
            n_rows = [-((start + 1 - end) // length) for start, end in pairwise(self._edges)]
            self._deals[length] = Deal(list(self._weights.values()), n_rows)
        return self._deals[length]

    def _spans(self, which: Iterable[int], length: int, seed: int) -> tuple[Tensor, Tensor]:
        """Positions in the tokens where rows start, and where their sources end, (n,) each."""
        found = list(self._deal(length).find(which, seed))
        starts = [self._edges[text] + row * length for text, row in found]
        return torch.tensor(starts, dtype=torch.int64), torch.tensor([self._edges[text + 1] for text, _ in found])

    def windows(self, length: int, n: int) -> Batch:
        """``n`` windows of ``length`` tokens to evaluate on, evenly spaced over the split and always the same.

        Ends of documents, which stand for no bytes, are not scored.

        Raises:
            ValueError: if the split is shorter than one window.
        """
        self.check(length)
        last = max(0, len(self.tokens) - length - 1)
        batch = self._windows(torch.arange(n) * last // max(n - 1, 1), length)
        if self.eos is None:
            return batch
        return replace(batch, targets=batch.targets.masked_fill(batch.targets == self.eos, UNSCORED))

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

    render = decode

    def described(self, length: int) -> str:
        """Summary of the corpus in one line: documents, bytes, tokens, and rows of ``length`` tokens."""
        assert self.store is not None, "only separate documents are counted"
        train, held_out = self.store.parts["train"], self.store.parts["held_out"]
        return (
            f"{self.source}: {train.documents:,} documents of {train.bytes:,} bytes to train on, {train.tokens:,} "
            f"tokens in {self.n_rows(length):,} rows of {length}; held out: {held_out.documents:,}"
        )

    def save_tokenizer(self, directory: str | Path) -> None:
        """Write the tokenizer beside a model, as ``tokenizer.json``."""
        self._tokenizer.save(directory)

    def fingerprint(self) -> int:
        """A checksum of the split's tokens."""
        return zlib.crc32(self.tokens[:].tobytes()) if self.store is None else self.store.parts[self.split].crc32

    def _windows(self, starts: Tensor, length: int, ends: Tensor | None = None) -> Batch:
        where = starts[:, None] + torch.arange(length + 1)
        end = torch.tensor([[len(self.tokens)]]) if ends is None else ends[:, None]
        tokens = torch.from_numpy(self.tokens[torch.minimum(where, end - 1).numpy()].astype(np.int64))
        ids, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        if self.eos is None:
            return Batch(ids, targets)
        beyond = where[:, 1:] >= end
        number = 1 + (ids == self.eos).cumsum(1)
        return Batch(ids.masked_fill(beyond, 0), targets.masked_fill(beyond, UNSCORED), number.masked_fill(beyond, 0))


@dataclass(eq=False)
class Rows(IterableDataset[Batch]):
    """Iterable dataset of one process's batches, for a ``torch.utils.data.DataLoader(..., batch_size=None)``.

    Batch ``i`` of all processes together is rows ``i * batch_size`` up to ``(i + 1) * batch_size`` of
    :meth:`Text.rows`, assigned to processes in turn, whatever the number of workers of a loader.

    Args:
        task: text; with ``separate`` to have ``<eos>`` between documents.
        length: tokens of a row.
        batch_size: rows of a batch of all processes together.
        seed: of the order.
        rank, world_size: of this process.
        first: number of the first batch, to resume from.
        last: number of the batch to stop before; None: never.

    Raises:
        ValueError: for a rank that does not exist.
    """

    task: Text
    length: int
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    first: int = 0
    last: int | None = None

    def __post_init__(self) -> None:
        n = self.world_size
        must(0 <= self.rank < n, f"rank={self.rank} of world_size={n}; use 0 to {n - 1}")

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, n_workers = (0, 1) if info is None else (info.id, info.num_workers)
        # A loader takes batches from its workers in turn.
        for i in count(self.first + worker, n_workers):
            if self.last is not None and i >= self.last:
                return
            places = range(i * self.batch_size, (i + 1) * self.batch_size)
            yield self.task.rows(places[self.rank :: self.world_size], self.length, self.seed)


def _opened(sources: Iterable[str], kind: str, max_bytes: int) -> list[Store]:
    """Open each source, tokenised by the same tokenizer: a ``"bpe:N"`` is trained on the first one."""
    found = list[Store]()
    for source in sources:
        found.append(tokenised(source, kind, max_bytes))
        kind = str(found[0].folder) if kind.startswith("bpe:") else kind
    return found


def _together(stores: list[Store]) -> Store:
    """Concatenate several sources."""
    first = stores[0]
    if len(stores) == 1:
        return first
    tokens, parts = dict[str, Tokens](), dict[str, Part]()
    for name in PARTS:
        tokens[name] = Tokens([shard for store in stores for shard in store.tokens[name].shards], first.tokenizer.dtype)
        parts[name] = total([store.parts[name] for store in stores])
        parts[name].crc32 = zlib.crc32(repr([store.parts[name].crc32 for store in stores]).encode())
    return Store(first.folder, first.tokenizer, tokens, parts)


@lru_cache(maxsize=4)
def _tokens(source: str, kind: str, max_bytes: int) -> tuple[Tokenizer, dict[str, np.ndarray]]:
    """The tokenizer of a corpus and the tokens of its two parts, kept for the life of the process."""
    parts: dict[str, list[str]] = {"train": [], "held_out": []}
    for document in documents(source, max_bytes):
        parts["held_out" if held_out(document) else "train"].append(document)
    made = tokenizer(kind, parts["train"])
    return made, {part: made.encode(texts) for part, texts in parts.items()}
