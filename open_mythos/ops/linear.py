"""Matrix products with a factor, with as few passes over memory as there can be.

Shape letters: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.ops.product import add_product, arithmetic, product, rows_product


def linear(x: Tensor, weight_OI: Tensor, scale: float = 1.0) -> Tensor:
    """``scale * x @ weight.T``: (..., I) -> (..., O)."""
    return linears(x, [weight_OI], [scale])[0]


def linears(x: Tensor, weights: Sequence[Tensor], scales: Sequence[float]) -> tuple[Tensor, ...]:
    """``scale * x @ weight.T`` for several weights (O, I) of one input (..., I): a tuple of (..., O).

    The factor is the product's own and costs nothing, forward or backward, and the gradients of ``x`` are summed where
    the products are made. Under autocast, see :func:`open_mythos.ops.product.arithmetic`.
    """
    if torch.compiler.is_compiling() or x.is_meta or any(type(w) not in _PLAIN for w in weights):
        # A compiler joins the factor to the product by itself; quantised and distributed weights know F.linear alone.
        return tuple(F.linear(x, weight) * scale for weight, scale in zip(weights, scales, strict=True))
    dtype, half = arithmetic(x)
    x, weights = x.to(dtype), [weight.to(dtype) for weight in weights]
    if torch.is_grad_enabled() and (x.requires_grad or any(weight.requires_grad for weight in weights)):
        return _Linears.apply(x, tuple(scales), half, *weights)
    x_NI = x.reshape(-1, x.shape[-1])
    products = [
        product(x_NI, weight.t(), scale, half) if half else rows_product(x_NI, weight, scale)
        for weight, scale in zip(weights, scales, strict=True)
    ]
    return tuple(out.view(*x.shape[:-1], -1) for out in products)


_PLAIN = (Tensor, torch.nn.Parameter)


class _Linears(torch.autograd.Function):
    """:func:`linears` with a backward pass that writes every gradient once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: tuple[float, ...], half: bool, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.scales, ctx.half = scales, half
        ctx.save_for_backward(x, *weights)
        x_NI = x.reshape(-1, x.shape[-1])
        products = [product(x_NI, weight.t(), scale, half) for weight, scale in zip(weights, scales, strict=True)]
        return tuple(out.view(*x.shape[:-1], -1) for out in products)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        x_NI = x.reshape(-1, x.shape[-1])
        grad_x, grad_weights = None, []
        for i, (grad, weight, scale) in enumerate(zip(grads, weights, ctx.scales, strict=True)):
            grad_NO = grad.reshape(-1, grad.shape[-1])
            if ctx.needs_input_grad[0]:
                if grad_x is None:
                    grad_x = product(grad_NO, weight, scale, ctx.half)
                else:
                    add_product(grad_x, grad_NO, weight, scale, ctx.half)
            needed = ctx.needs_input_grad[3 + i]
            grad_weights.append(product(grad_NO.t(), x_NI, scale, ctx.half) if needed else None)
        return None if grad_x is None else grad_x.view(x.shape), None, None, *grad_weights
