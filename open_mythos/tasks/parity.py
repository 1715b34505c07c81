"""Running parity: the smallest problem whose depth grows with its length."""

from __future__ import annotations

import torch
from torch import Tensor

VOCAB_SIZE = 3
"""Token 0 is not used; bits 0 and 1, and likewise parities, are tokens 1 and 2."""


def parity_batch(n: int, length: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Random bits and, at every position, the parity of the bits so far.

    Args:
        n: sequences.
        length: bits in each.
        generator: random state to draw from.

    Returns:
        Tokens and targets, (n, length) int64 each.
    """
    bits = torch.randint(0, 2, (n, length), generator=generator)
    return bits + 1, bits.cumsum(1) % 2 + 1
