"""Addition of two long numbers, with long carry chains."""

from dataclasses import dataclass

import torch

from open_mythos.fields import size
from open_mythos.tasks.base import UNSCORED, Batch, Task

PROPAGATE_SHARE = 0.9  # of digit pairs propagate a carry, in the half of the problems with long carry chains


@dataclass
class Addition(Task):
    """Two numbers of ``difficulty`` digits, least significant first, interleaved: ``a0 b0 a1 b1 … =``.

    The target at each digit of b is the digit of the sum, and at ``=`` the final carry, 0 or 1. Carry chains of
    uniform digits are short, so in a random half of the problems 90% of the pairs, except the first, are made to sum
    to ``base - 1``, which propagates a carry.

    Token 1 + d is the digit d, token 1 + base is ``=``.
    """

    name = "addition"
    unit = "digits"
    base: int = size(10, minimum=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.vocab = ("<pad>", *map(str, range(self.base)), "=")
        # guessing base - 1, which is right for propagating pairs without a carry
        self.chance = PROPAGATE_SHARE / 4 + (1 - PROPAGATE_SHARE / 2) / self.base

    def length(self, difficulty: int) -> int:
        return 2 * difficulty + 1

    def batch(self, n: int, difficulty: int, generator: torch.Generator | None = None) -> Batch:
        a, b = torch.randint(0, self.base, (2, n, difficulty), generator=generator)
        propagates = torch.rand(n, difficulty, generator=generator) < PROPAGATE_SHARE
        propagates &= torch.rand(n, 1, generator=generator) < 0.5
        propagates[:, 0] = False  # otherwise most long chains would have no carry to propagate
        b = torch.where(propagates, self.base - 1 - a, b)

        # the carry out of a digit comes from the last digit up to it that does not propagate, or from the first
        decides = a + b != self.base - 1
        source = torch.where(decides, torch.arange(difficulty), 0).cummax(1).values
        carry = (a + b >= self.base).gather(1, source)
        carry_in = torch.cat([torch.zeros(n, 1, dtype=torch.bool), carry[:, :-1]], 1)

        ids = torch.cat([torch.stack([a, b], 2).flatten(1) + 1, torch.full((n, 1), self.base + 1)], 1)
        targets = torch.full_like(ids, UNSCORED)
        targets[:, 1::2] = (a + b + carry_in) % self.base + 1
        targets[:, -1] = carry[:, -1] + 1
        return Batch(ids, targets)
