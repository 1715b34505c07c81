"""Mixtures of several texts with weights: which row of which text is at each place of an endless sequence."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import lcm

import torch
from torch import Tensor

from open_mythos.fields import must

MOST_SOURCES = 256
ORDERED = 1 << 20  # maximum number of rows that are permuted together
_BLOCK, _MOST_PARTS = 1 << 10, 1 << 16  # minimum places in a block, and finest share: one place in so many


def parsed(source: str) -> list[tuple[str, Fraction]]:
    """Parse the texts in ``source`` with their weights: ``"docs/:2,src/:1"``, 1 if none is given.

    An existing path that contains a comma is one text.

    Raises:
        ValueError: for an empty name, a weight of 0, a text that is named twice, or too many texts.
    """
    if "," not in source or os.path.exists(os.path.expanduser(source)):
        return [(source, Fraction(1))]
    found = []
    for word in source.split(","):
        weighted = re.fullmatch(r"(.+):(\d+(?:\.\d+)?)", word.strip())
        found.append((weighted[1], Fraction(weighted[2])) if weighted else (word.strip(), Fraction(1)))
    names = [name for name, _ in found]
    for name, weight in found:
        must(name != "", f"source={source!r} has an empty name beside a comma; write it as in docs/:2,src/:1")
        must(weight > 0, f"source={source!r} has {name!r} at weight 0; leave it out, or use a weight above 0")
        must(names.count(name) == 1, f"source={source!r} has {name!r} twice; name it once, with the sum of its weights")
    must(len(found) <= MOST_SOURCES, f"source has {len(found)} texts; use at most {MOST_SOURCES}")
    return found


def joined(texts: Iterable[tuple[str, Fraction]]) -> str:
    """Write texts and weights as the string that :func:`parsed` reads."""
    named = [(name, f"{float(weight):.12g}") for name, weight in texts]
    return named[0][0] if len(named) == 1 else ",".join(f"{name}:{weight}" for name, weight in named)


@dataclass
class Deal:
    """Assignment of rows of several texts to the places of an endless sequence, by place and seed alone.

    In every block of places each text has its share, in random order; and each text goes through all its rows in
    random order, epoch after epoch. Since nothing else matters, processes may each read their own places.

    Args:
        weights: of the texts.
        n_rows: of each text.
    """

    weights: Sequence[Fraction]
    n_rows: Sequence[int]
    shares: list[int] = field(init=False)  # places of each text in a block of `sum(shares)`
    _kept: dict[int, tuple[int, Tensor]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        whole = sum(self.weights)
        exact = lcm(*(weight.denominator for weight in (weight / whole for weight in self.weights)))
        parts = exact * -(-_BLOCK // exact) if exact <= _MOST_PARTS else _MOST_PARTS
        shares = [weight / whole * parts for weight in self.weights]
        self.shares = [max(1, int(share)) for share in shares]
        # places left over by rounding down go to the texts that lost most by it
        by_loss = sorted(range(len(shares)), key=lambda i: self.shares[i] - shares[i])
        for i in by_loss[: max(0, parts - sum(self.shares))]:
            self.shares[i] += 1

    def find(self, places: Iterable[int], seed: int) -> Iterator[tuple[int, int]]:
        """The text at each place, and the row of that text."""
        for place in places:
            text, nth = self._dealt(place, seed)
            yield text, self._row(text, nth, seed)

    def seen(self, places: int, seed: int) -> list[int]:
        """Number of rows of each text in the first ``places`` places."""
        block, rest = divmod(places, sum(self.shares))
        texts = self._block(block, seed)[0][:rest]
        return [block * share + int((texts == text).sum()) for text, share in enumerate(self.shares)]

    def _dealt(self, place: int, seed: int) -> tuple[int, int]:
        """The text at a place, and at how many earlier places it was."""
        if len(self.shares) == 1:
            return 0, place
        block, at = divmod(place, sum(self.shares))
        texts, before = self._block(block, seed)
        text = int(texts[at])
        return text, block * self.shares[text] + int(before[at])

    def _block(self, block: int, seed: int) -> Tensor:
        """The texts of a block of N places, and at how many earlier places of it each one was: (2, N)."""

        def make(order: Tensor) -> Tensor:
            texts = torch.arange(len(self.shares)).repeat_interleave(torch.tensor(self.shares))[order]
            before = torch.empty_like(texts)
            for text, share in enumerate(self.shares):
                before[texts == text] = torch.arange(share)
            return torch.stack([texts, before])

        return self._drawn(MOST_SOURCES, block, seed, sum(self.shares), make)

    def _row(self, text: int, nth: int, seed: int) -> int:
        """The ``nth`` row drawn from a text.

        More than ``ORDERED`` rows are split into strides (every k-th row of the text), each with its own random order.
        """
        n = self.n_rows[text]
        epoch, at = divmod(nth, n)
        n_strides = -(-n // ORDERED)
        size, longer = divmod(n, n_strides)  # the first `longer` strides have one row more
        stride, at = divmod(at, size + 1) if at < longer * (size + 1) else divmod(at - longer, size)
        order = self._drawn(text, epoch * n_strides + stride, seed, size + (stride < longer), Tensor.int)
        return stride + n_strides * int(order[at])

    def _drawn(self, what: int, number: int, seed: int, n: int, make: Callable[[Tensor], Tensor]) -> Tensor:
        """``make`` of a random permutation of ``n``; the last one for each ``what`` is cached, as places ascend."""
        # the generator takes 32 bits; for a single text and seed 0 the key is the number itself
        key = (number + 0x9E3779B1 * seed + 0x85EBCA77 * what) % (1 << 32)
        kept = self._kept.get(what)
        if kept is None or kept[0] != key:
            kept = self._kept[what] = key, make(torch.randperm(n, generator=torch.Generator().manual_seed(key)))
        return kept[1]
