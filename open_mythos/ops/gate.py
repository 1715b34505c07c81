"""What a halting gate looks at, and what it says: asked after every loop, of few positions in decoding.

Shape letters: N positions, D state width, M hidden units.
"""

from __future__ import annotations

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
