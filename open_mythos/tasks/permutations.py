"""Products of permutations: the word problem of a symmetric group."""

import itertools
from dataclasses import dataclass

import torch

from open_mythos.fields import choice, must, size
from open_mythos.tasks.base import Batch, Task


@dataclass
class Permutations(Task):
    """Permutations of ``size`` elements; the target at each one is the product of the prefix, leftmost applied first.

    For five elements (S5) no transformer of fixed depth does this at every length: the problem is complete for NC1, and
    such transformers stay inside TC0 (Merrill et al., 2404.08819).

    Token 1 + i is the i-th permutation in lexicographic order, as input and output; "21345" swaps the first two.
    ``generators`` are those drawn as input: all, all transpositions, or the adjacent transpositions. Every position is
    scored.
    """

    name = "permutations"
    unit = "permutations"
    generators: str = choice("all", "all", "transpositions", "adjacent")
    size: int = size(5, minimum=3)

    def __post_init__(self) -> None:
        super().__post_init__()
        must(self.size <= 5, f"size={self.size} is too large; use 3 to 5, as there are size! tokens")
        group = torch.tensor(list(itertools.permutations(range(self.size))))
        self.vocab = ("<pad>", *("".join(str(image + 1) for image in element) for element in group.tolist()))

        moved = group != torch.arange(self.size)
        transpositions = moved.sum(1) == 2
        adjacent = transpositions & (moved[:, 1:] & moved[:, :-1]).any(1)
        sets = {"all": torch.ones_like(adjacent), "transpositions": transpositions, "adjacent": adjacent}
        self._generators = sets[self.generators].nonzero().squeeze(1)
        # the sign of a product of transpositions is known from their number, which leaves half of the group
        self.chance = (1 if self.generators == "all" else 2) / len(group)

        products = group[:, group].transpose(0, 1)  # [i, j]: i, then j
        place_values = self.size ** torch.arange(self.size).flip(0)  # as numbers, permutations ascend
        self._product = torch.searchsorted(group @ place_values, products @ place_values)

    def batch(self, n: int, difficulty: int, generator: torch.Generator | None = None) -> Batch:
        ids = self._generators[torch.randint(0, len(self._generators), (n, difficulty), generator=generator)]
        # parallel scan: after k rounds each position holds the product of the 2^k elements up to it
        prefix, span = ids, 1
        while span < difficulty:
            products = self._product[prefix[:, :-span], prefix[:, span:]]
            prefix, span = torch.cat([prefix[:, :span], products], 1), 2 * span
        return Batch(ids + 1, prefix + 1)
