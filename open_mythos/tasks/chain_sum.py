"""Chain sum: the sum of a sequence of digits, with only the final answer scored."""

from dataclasses import dataclass

import torch

from open_mythos.fields import size
from open_mythos.tasks.base import UNSCORED, Batch, Task

START, EQUALS, DIGIT = 1, 2, 3


@dataclass
class ChainSum(Task):
    """``START d1 d2 … dn =``; the target at ``=`` is the sum of the digits modulo ``modulus``.

    Token 3 + d is the digit d. Partial sums are not supervised: only ``=`` is scored.
    """

    name = "chain_sum"
    unit = "digits"
    modulus: int = size(7, minimum=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.vocab = ("<pad>", "START", "=", *map(str, range(self.modulus)))
        self.chance = 1 / self.modulus

    def length(self, difficulty: int) -> int:
        return difficulty + 2

    def batch(self, n: int, difficulty: int, generator: torch.Generator | None = None) -> Batch:
        digits = torch.randint(0, self.modulus, (n, difficulty), generator=generator)
        ids = torch.cat([torch.full((n, 1), START), digits + DIGIT, torch.full((n, 1), EQUALS)], 1)
        targets = torch.full_like(ids, UNSCORED)
        targets[:, -1] = digits.sum(1) % self.modulus + DIGIT
        return Batch(ids, targets)
