"""The C code of ``ops/native``: float32 on processors with AVX-512.

Products, attention, norms and SwiGLUs go through it by themselves where it can be had: with a C compiler, at the first
call, unless ``OPEN_MYTHOS_NATIVE=0`` is in the environment. Everywhere else PyTorch's own operations do the same, and
tests hold the two together. The code is in the dialect of gcc.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from open_mythos.native import library

# Arguments of each function of kernels.c: p for a pointer, n for an int64_t, i for an int, f for a float.
_ARGUMENTS = {
    "mythos_product": "pnpnnpnnnnnfiii",
    "mythos_grouped": "ppnnpnnnpnnnii",
    "mythos_outers": "ppppnnnniii",
    "mythos_greatest": "pppnnni",
    "mythos_attend": "pfii",
    "mythos_attend_few": "pfi",
    "mythos_rows": "pppnnnfii",
    "mythos_experts_few": "ppppppnnnni",
    "mythos_norm": "pppnnfi",
    "mythos_norm_backward": "pppppnnfi",
    "mythos_swiglu": "ppppnnni",
    "mythos_swiglu_backward": "ppppppppnnni",
    "mythos_turn": "pppnnnnnfi",
    "mythos_relative_change": "pppnni",
    "mythos_ask": "pppppppnnnfffi",
    "mythos_has_half": "",
}
_PLAIN = (Tensor, torch.nn.Parameter)
_KINDS = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The compiled code, or None where it cannot be had."""
    if os.environ.get("OPEN_MYTHOS_NATIVE") == "0" or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    try:
        code = library(Path(__file__).parent / "native" / "kernels.c", "-fopenmp")
    except ValueError:
        return None
    for name, kinds in _ARGUMENTS.items():
        getattr(code, name).argtypes = [_KINDS[kind] for kind in kinds]
    return code


def has_kernels(*tensors: Tensor) -> bool:
    """Whether the C code takes these tensors.

    They are float32 on the CPU, plain ones with numbers of their own, and nobody compiles, transforms or watches
    PyTorch's operations, as ``torch.func`` and counters of operations do.
    """
    if torch.compiler.is_compiling():
        return False
    for x in tensors:
        if x.dtype != torch.float32 or not x.is_cpu or type(x) not in _PLAIN:
            return False
    watched = is_in_torch_dispatch_mode() or torch._C._are_functorch_transforms_active()
    return not watched and kernels() is not None


def has_half() -> bool:
    """Whether the C code can round the factors of its products to bfloat16, and multiply those."""
    code = kernels()
    return code is not None and bool(code.mythos_has_half()) and not is_in_torch_dispatch_mode()


def address(x: Tensor | None) -> int | None:
    """Where a tensor's numbers begin; None, which is NULL, for None."""
    return None if x is None else x.data_ptr()
