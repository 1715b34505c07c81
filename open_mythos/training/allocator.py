"""The C library's allocator on the CPU: keep freed memory for the next step, or return it where memory is short."""

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
    """Have the C library keep freed memory instead of returning it, for this process and from now on.

    glibc returns large blocks to the system, and every page of a new one costs a page fault: a twentieth of a training
    step's time, and a quarter where many experts have gradients in bfloat16. Each step allocates the same blocks as the
    last one, so keeping them takes hardly more memory. Other C libraries, and settings of the user's own
    (``MALLOC_...``), are left as they are.
    """
    if _is_glibc() and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt = ctypes.CDLL(None).mallopt
        for threshold in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            mallopt(threshold, _NEVER)


def is_full(error: BaseException) -> bool:
    """Whether an error means out of memory. PyTorch has a class of its own on GPUs, but only a message on the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def memory() -> float:
    """Physical memory of the machine in bytes; infinite where it is not known."""
    known = {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= getattr(os, "sysconf_names", {}).keys()
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) if known else math.inf


def give_back_here(x: Tensor) -> Tensor:
    """Return ``x``; in its forward and its backward pass, the C library returns all free pages to the system.

    glibc puts small objects between the large blocks of a loop. Where these live on, as the graph of a loop does until
    its backward pass, the freed space fragments and the next loop's blocks are placed elsewhere: memory grows with
    every loop, though hardly any is in use. A page that is returned and needed again costs a page fault.
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
