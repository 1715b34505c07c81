"""Prefix sums, the first benchmark of the Deep Thinking papers (2106.04537, 2202.05826)."""

from dataclasses import dataclass

import torch

from open_mythos.fields import size
from open_mythos.tasks.base import Batch, Task


@dataclass
class PrefixSums(Task):
    """Digits below ``modulus``; the target at each one is the sum of the prefix, modulo ``modulus``.

    Modulo 2 it equals :class:`~open_mythos.tasks.parity.Parity`; the protocol differs: 2202.05826 trains on at most 32
    bits, tests on 512, and counts a problem as solved only if all of it is right.

    Token 1 + d is the digit d, as input and output. Every position is scored.
    """

    name = "prefix_sums"
    unit = "digits"
    modulus: int = size(2, minimum=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.vocab = ("<pad>", *map(str, range(self.modulus)))
        self.chance = 1 / self.modulus

    def batch(self, n: int, difficulty: int, generator: torch.Generator | None = None) -> Batch:
        digits = torch.randint(0, self.modulus, (n, difficulty), generator=generator)
        return Batch(digits + 1, digits.cumsum(1) % self.modulus + 1)
