"""Memory of the CPU: what one training step gives back, the next takes again; or the system, where memory is short."""

import ctypes
import functools
import math
import os
import platform
from typing import Any

import torch
from torch import Tensor

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3), as in malloc.h
_NEVER = 2**30  # bytes


def keep_freed_memory() -> None:
    """Have the C library keep what is freed, for this process and from now on.

    glibc returns large blocks to the system, and every page of a new one costs a fault: of a training step a twentieth,
    and a quarter where many experts have gradients in bfloat16. A step's blocks are those of the step before, so that
    keeping them takes hardly more memory. Another C library, or settings of the user's own (``MALLOC_...``), are left
    as they are.
    """
    if _is_glibc() and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt = ctypes.CDLL(None).mallopt
        for threshold in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            mallopt(threshold, _NEVER)


def is_full(error: BaseException) -> bool:
    """Whether an error is of memory that is not there: PyTorch has its own for a GPU, and none for the rest."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def memory() -> float:
    """Bytes of memory that the machine has; infinite where it does not say."""
    known = {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= getattr(os, "sysconf_names", {}).keys()
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) if known else math.inf


def give_back_here(x: Tensor) -> Tensor:
    """``x``; whenever it is computed, and when its gradient is, the C library gives all free pages to the system.

    glibc leaves small objects between the large blocks of a loop, and where those live on, as the graph of a loop does
    until its backward pass, the blocks of the next loop come to lie elsewhere: free memory grows with every loop,
    though hardly any is in use. What is given back and taken again costs a fault a page.
    """
    return _GiveBack.apply(x) if x.is_cpu and _is_glibc() else x


class _GiveBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctypes.CDLL(None).malloc_trim(0)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        ctypes.CDLL(None).malloc_trim(0)
        return grad


@functools.cache
def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
