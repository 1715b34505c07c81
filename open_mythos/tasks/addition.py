"""Addition of two long numbers, whose carries may run from one end to the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from open_mythos.fields import size
from open_mythos.tasks.base import UNSCORED, Batch, Task

PASSING = 0.9
"""Share of digit pairs, in the half of the problems with long carries, that pass a carry on."""


@dataclass
class Addition(Task):
    """Two numbers of ``difficulty`` digits, least significant first, their digits taken in turn: ``a0 b0 a1 b1 … =``.

    At each digit of b the digit of the sum is to be said, and at the ``=`` the last carry, 0 or 1. With uniform
    digits a carry dies after a few places, so in half of the problems (a coin for each) nine pairs in ten, the first
    aside, are made to sum to ``base - 1``, which passes a carry on unchanged.

    Token 1 + d is the digit d, token 1 + base is ``=``.
    """

    name = "addition"
    unit = "digits"
    base: int = size(10, minimum=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.vocab = ("<pad>", *map(str, range(self.base)), "=")
        self.chance = PASSING / 4 + (1 - PASSING / 2) / self.base  # of the digit base - 1: half of the passing pairs

    def length(self, difficulty: int) -> int:
        return 2 * difficulty + 1

    def batch(self, n: int, difficulty: int, generator: torch.Generator | None = None) -> Batch:
        self.check(difficulty)
        a, b = torch.randint(0, self.base, (2, n, difficulty), generator=generator)
        passing = torch.rand(n, difficulty, generator=generator) < PASSING
        passing &= torch.rand(n, 1, generator=generator) < 0.5
        passing[:, 0] = False  # else most long runs would have no carry to pass
        b = torch.where(passing, self.base - 1 - a, b)

        # the carry out of a place is decided at the last place, up to this one, that does not pass its carry on; or at
        # the first, which has none to pass
        decides = a + b != self.base - 1
        place = torch.where(decides, torch.arange(difficulty), 0).cummax(1).values
        carry = (a + b >= self.base).gather(1, place)
        carry_in = torch.cat([torch.zeros(n, 1, dtype=torch.bool), carry[:, :-1]], 1)

        ids = torch.cat([torch.stack([a, b], 2).flatten(1) + 1, torch.full((n, 1), self.base + 1)], 1)
        targets = torch.full_like(ids, UNSCORED)
        targets[:, 1::2] = (a + b + carry_in) % self.base + 1
        targets[:, -1] = carry[:, -1] + 1
        return Batch(ids, targets)
