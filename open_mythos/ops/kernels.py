"""The C code of ``ops/native``: float32 on processors with AVX-512.

Products, attention, norms and SwiGLUs go through it by themselves where it can be had: with a C compiler, at the first
call, unless ``OPEN_MYTHOS_NATIVE=0`` is in the environment. Everywhere else PyTorch's own operations do the same, and
tests hold the two together.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from open_mythos.native import library


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The compiled code, or None where it cannot be had."""
    if os.environ.get("OPEN_MYTHOS_NATIVE") == "0" or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    try:
        return library(Path(__file__).parent / "native" / "kernels.c", "-fopenmp")
    except ValueError:
        return None


def has_kernels(*tensors: Tensor) -> bool:
    """Whether the C code takes these tensors: plain float32 ones on the CPU, and nobody is compiling or tracing."""
    if torch.compiler.is_compiling():
        return False
    for x in tensors:
        if x.dtype != torch.float32 or not x.is_cpu:
            return False
    return kernels() is not None


def has_half() -> bool:
    """Whether the C code can round the factors of its products to bfloat16, and multiply those."""
    code = kernels()
    return code is not None and bool(code.mythos_has_half())


def address(x: Tensor | None) -> ctypes.c_void_p:
    """Where a tensor's numbers begin; NULL for None."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def size(n: int) -> ctypes.c_int64:
    """An integer as the C code has them."""
    return ctypes.c_int64(n)
