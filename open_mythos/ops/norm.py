"""Root-mean-square normalisation, with as few passes over memory as there can be."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.ops.kernels import address, has_kernels, kernels

_FEW = 8192  # inputs up to which another call costs more than another pass


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """``weight * x / rms(x)`` over the last axis, in x's dtype; the mean square is taken in float32.

    Args:
        x: (..., dim).
        weight: (dim,), ones if None.
        eps: added to the mean square.
    """
    if weight is not None:
        weight = weight.to(x.dtype)
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad))
    if not needs_grad and has_kernels(x):
        return _native_norm(x, weight, eps)
    on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
    # There PyTorch squares float16 in float16, and writes five tensors of x's size where two do.
    if on_cpu and (needs_grad or x.dtype.itemsize < 4 or x.numel() > _FEW):
        return _RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


class _RMSNorm(torch.autograd.Function):
    """:func:`rms_norm` where PyTorch has no kernel of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        ctx.eps = eps
        if has_kernels(x):
            ctx.save_for_backward(x, None, weight)
            return _native_norm(x, weight, eps)
        wide = _wide(x)
        inverse = torch.linalg.vecdot(wide, wide).unsqueeze(-1).div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse, weight)
        out = wide * inverse
        return (out if weight is None else out.mul_(weight)).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, inverse, weight = ctx.saved_tensors
        if inverse is None:
            return *_native_norm_backward(grad, x, weight, ctx.eps, ctx.needs_input_grad[1]), None
        wide, grad = _wide(x), _wide(grad)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            normed = (wide * inverse).mul_(grad)
            grad_weight = normed.view(-1, normed.shape[-1]).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        out = grad * inverse if weight is None else (grad * weight).mul_(inverse)
        along = torch.linalg.vecdot(out, wide).unsqueeze(-1).mul_(inverse.square()).div_(-x.shape[-1])
        return out.addcmul_(wide, along).to(x.dtype), grad_weight, None


def _native_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    code, x = kernels(), x.contiguous()
    assert code is not None
    out, width = torch.empty_like(x), x.shape[-1]
    threads = torch.get_num_threads() if x.numel() > _FEW else 1
    code.mythos_norm(
        address(out), address(x), address(weight), x.numel() // width, width, eps, threads
    )  # fmt: skip
    return out


def _native_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, needs_weight: bool
) -> tuple[Tensor, Tensor | None]:
    code, x, grad = kernels(), x.contiguous(), grad.contiguous()
    assert code is not None
    out, width, threads = torch.empty_like(x), x.shape[-1], torch.get_num_threads()
    sums = x.new_zeros(threads, width) if needs_weight else None
    code.mythos_norm_backward(
        address(out), address(sums), address(grad), address(x), address(weight), x.numel() // width,
        width, eps, threads,
    )  # fmt: skip
    return out, None if sums is None else sums.sum(0)


def _wide(x: Tensor) -> Tensor:
    """``x`` in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
