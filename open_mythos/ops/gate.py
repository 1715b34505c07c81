"""What a halting gate looks at, and what it says: asked after every loop, of few positions in decoding.

Shape letters: N positions, D state width, M hidden units.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from open_mythos.ops.kernels import address, has_kernels, kernels

FINEST = 1e-3  # changes below it look alike to a gate: bfloat16 knows none that are smaller
_MANY = 2**14  # numbers from which on several threads read them


def relative_change(before: Tensor, after: Tensor) -> Tensor:
    """``|after - before| / |after|`` over the last axis, in float32; 0 where both are 0."""
    if not torch.is_grad_enabled() and before.is_contiguous() and after.is_contiguous() and has_kernels(before, after):
        code, out, D = kernels(), after.new_empty(after.shape[:-1]), after.shape[-1]
        assert code is not None
        code.mythos_relative_change(address(out), address(before), address(after), out.numel(), D, _threads(after))
        return out
    size = after.float().norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return (after.float() - before.float()).norm(dim=-1) / size


def follow_change(h: Tensor) -> Callable[[Tensor, Tensor], float]:
    """:func:`relative_change` of one position's states before and after a loop, each like ``h``, as a number."""
    if torch.is_grad_enabled() or not has_kernels(h):
        return lambda before, after: float(relative_change(before, after))
    code, found, D = kernels(), ctypes.c_float(), h.numel()
    assert code is not None
    measure, at = code.mythos_relative_change, ctypes.addressof(found)

    def change(before: Tensor, after: Tensor) -> float:
        before, after = before.contiguous(), after.contiguous()
        measure(at, before.data_ptr(), after.data_ptr(), 1, D, 1)
        return found.value

    return change


def follow_gate(
    h: Tensor, hidden_MD: Tensor, scale: float, motion_M: Tensor, halt_M: Tensor, bias: Tensor, sharpness: float
) -> Callable[[Tensor, Tensor], float]:
    """What :func:`gate` says of one position's states before and after a loop, each like ``h``, as a number.

    Between two loops of one token there is hardly more to do than to call.
    """
    code, said = kernels(), (ctypes.c_float * 2)()
    M, D = hidden_MD.shape
    assert code is not None and hidden_MD.is_contiguous()
    at = ctypes.addressof(said)
    weights = [x.data_ptr() for x in (hidden_MD, motion_M, halt_M, bias)]
    measure, ask, change_at = code.mythos_relative_change, code.mythos_ask, at + ctypes.sizeof(ctypes.c_float)

    def probability(before: Tensor, after: Tensor) -> float:
        before, after = before.contiguous(), after.contiguous()
        measure(change_at, before.data_ptr(), after.data_ptr(), 1, D, 1)
        if ask(at, after.data_ptr(), change_at, *weights, 1, D, M, FINEST, scale, sharpness, 1):
            raise MemoryError("no memory for a gate's hidden units")
        return said[0]

    return probability


def gate(
    x: Tensor, change: Tensor | None, hidden_MD: Tensor, scale: float, motion_M: Tensor, halt_M: Tensor, bias: Tensor,
    sharpness: float,
) -> Tensor:  # fmt: skip
    """The probability that a state is done, in C: (...).

    Args:
        x: states (..., D), for which :func:`has_kernels`, as for the weights.
        change: their :func:`relative_change` (...); None for 1 - :data:`FINEST`.
        hidden_MD, scale: of the hidden layer, which sees states behind a norm.
        motion_M: what each hidden unit makes of the logarithm of ``change + FINEST``.
        halt_M, bias: of the output, whose input is scaled by ``1 / sqrt(M)``; bias is (1,).
        sharpness: factor of ``motion_M`` and of the logit.
    """
    code, out, x = kernels(), x.new_empty(x.shape[:-1]), x.contiguous()
    change = None if change is None else change.contiguous()
    M, D = hidden_MD.shape
    assert code is not None and hidden_MD.is_contiguous()
    if code.mythos_ask(
        address(out), address(x), address(change), address(hidden_MD), address(motion_M), address(halt_M),
        address(bias), out.numel(), D, M, FINEST, scale, sharpness, _threads(x),
    ):  # fmt: skip
        raise MemoryError("no memory for a gate's hidden units")
    return out


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() >= _MANY else 1
