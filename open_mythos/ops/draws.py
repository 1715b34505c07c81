"""Counter-based random numbers: a function of key and counter, in whatever order they are drawn (Salmon et al. 2011).

Each row of a batch has its own key, so that a row's draws do not depend on the other rows, and a recomputed loop draws
the same numbers again.
"""

import math

import torch
from torch import Tensor

# SplitMix64 (Steele et al. 2014): its odd stride, and the two factors of its finaliser, as signed 64-bit integers
_STRIDE, _FIRST, _SECOND = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def row_keys(seed: int, step: int, n: int) -> Tensor:
    """The keys of the ``n`` rows of a step, (n,) int64."""
    return _mixed(_mixed(_mixed(torch.tensor(seed)) + step) + torch.arange(n))


def uniform(keys_B: Tensor, site: int, like: Tensor) -> Tensor:
    """Numbers in (0, 1) in the shape of ``like`` (B, ...), float32; ``site`` numbers what a row draws them for."""
    counts = torch.arange(math.prod(like.shape[1:]), device=like.device) * _STRIDE
    bits = _mixed(_mixed(keys_B.to(like.device, non_blocking=True) + site).unsqueeze(1) + counts)
    numbers = (_shifted(bits, 40).float() + 0.5) * 2.0**-24
    return numbers.clamp(max=1 - 2.0**-24).view(like.shape)  # the last of them is rounded up to 1


def normal(keys_B: Tensor, site: int, like: Tensor) -> Tensor:
    """As :func:`uniform`, normally distributed, in the dtype of ``like``."""
    return (math.sqrt(2) * torch.erfinv(2 * uniform(keys_B, site, like) - 1)).to(like.dtype)


def _mixed(x: Tensor) -> Tensor:
    x = x + _STRIDE
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, n: int) -> Tensor:
    """Logical right shift."""
    return (x >> n) & ((1 << (64 - n)) - 1)
