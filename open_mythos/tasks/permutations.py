"""Products of permutations: the word problem of a symmetric group."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from open_mythos.fields import choice, must, size
from open_mythos.tasks.base import Batch, Task


@dataclass
class Permutations(Task):
    """Permutations of ``size`` things; at every one, the product of those so far, the first applied first.

    For five things (the group S5) no transformer of fixed depth does this at every length (Merrill et al., 2404.08819:
    the problem is complete for NC1, and such transformers stay inside TC0).

    Token 1 + i is the i-th permutation in lexicographic order, asked or answered; "21345" swaps the first two things.
    ``generators`` are those drawn as input: all of them, the swaps of any two things, or the swaps of two neighbours.
    Every position is scored.
    """

    name = "permutations"
    unit = "permutations"
    generators: str = choice("all", "all", "transpositions", "adjacent")
    size: int = size(5, minimum=3)

    def __post_init__(self) -> None:
        super().__post_init__()
        must(self.size <= 5, f"size={self.size} is too large; use 3 to 5, as there are size! tokens")
        elements = torch.tensor(list(itertools.permutations(range(self.size))))
        self.vocab = ("<pad>", *("".join(str(thing + 1) for thing in element) for element in elements.tolist()))

        moved = elements != torch.arange(self.size)
        swaps = moved.sum(1) == 2
        neighbours = swaps & (moved[:, 1:] & moved[:, :-1]).any(1)
        drawn = {"all": torch.ones_like(swaps), "transpositions": swaps, "adjacent": neighbours}[self.generators]
        self._drawn = drawn.nonzero().squeeze(1)
        # a product of swaps is odd or even with their number, which leaves half of the elements to guess among
        self.chance = (1 if self.generators == "all" else 2) / len(elements)

        # _product[i, j] is element i, then element j: thing x goes where j takes what i makes of it
        products = elements[:, elements].transpose(0, 1)
        place_values = self.size ** torch.arange(self.size)
        rank = torch.zeros(self.size**self.size, dtype=torch.int64)
        rank[elements @ place_values] = torch.arange(len(elements))
        self._product = rank[products @ place_values]

    def length(self, difficulty: int) -> int:
        return difficulty

    def batch(self, n: int, difficulty: int, generator: torch.Generator | None = None) -> Batch:
        self.check(difficulty)
        ids = self._drawn[torch.randint(0, len(self._drawn), (n, difficulty), generator=generator)]
        # by doubling: after k rounds each position holds the product of the 2^k elements up to it
        running, reach = ids, 1
        while reach < difficulty:
            products = self._product[running[:, :-reach], running[:, reach:]]
            running, reach = torch.cat([running[:, :reach], products], 1), 2 * reach
        return Batch(ids + 1, running + 1)
