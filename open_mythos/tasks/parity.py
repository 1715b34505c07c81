"""Running parity."""

import torch

from open_mythos.tasks.base import Batch, Task


class Parity(Task):
    """Random bits; the target at each one is the parity of the prefix.

    Tokens 1 and 2 are bits 0 and 1 as input, even and odd as output. Every position is scored.
    """

    name = "parity"
    unit = "bits"
    vocab = ("<pad>", "0", "1")
    chance = 0.5

    def batch(self, n: int, difficulty: int, generator: torch.Generator | None = None) -> Batch:
        bits = torch.randint(0, 2, (n, difficulty), generator=generator)
        return Batch(bits + 1, bits.cumsum(1) % 2 + 1)
