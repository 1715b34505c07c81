"""Mixture-of-experts arithmetic: all experts in a few matrix products over rows brought together by expert.

Shape letters: N tokens, K experts per token, E experts, C rows given to each, P rows of all, D model width, F expert
width. The slow, obvious twin is :func:`open_mythos.ops.reference.moe_loop`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.ops.kernels import address, has_kernels, kernels
from open_mythos.ops.linear import linear
from open_mythos.ops.one_gradient import OneGradient, one_gradient
from open_mythos.ops.product import arithmetic, is_native
from open_mythos.ops.rows import Rows
from open_mythos.ops.swiglu import swiglu, weighted, weighted_backward

_FEW = 8  # choices up to which bringing rows together costs more than it saves
_MANY = 2**14  # numbers of the matrices that a few tokens meet, from which on several threads read them


def grouped_swiglu(
    x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, experts_NK: Tensor, weights_NK: Tensor, scale: float = 1.0
) -> Tensor:
    """Sum over each token's K experts of ``weight * down(silu(scale * gate(x)) * scale * up(x))``.

    Rows are brought together by expert, all experts are multiplied at once, and every token gathers its results. No
    loop over experts, and experts without tokens cost nothing.

    Args:
        x_ND: tokens.
        gate_up_E2FD: gate (first F rows) and up projections of every expert.
        down_EDF: down projections.
        experts_NK: chosen experts, integers in [0, E).
        weights_NK: mixing weights.
        scale: factor of ``gate_up``.

    Returns:
        (N, D) in the dtype that :func:`open_mythos.ops.product.arithmetic` says.
    """
    is_few = experts_NK.numel() <= _FEW and experts_NK.is_cpu and not torch.is_grad_enabled()
    if is_few and has_kernels(x_ND, gate_up_E2FD, down_EDF, weights_NK) and not torch.is_autocast_enabled("cpu"):
        return _few(x_ND if scale == 1 else x_ND * scale, gate_up_E2FD, down_EDF, experts_NK, weights_NK)
    dtype, half = arithmetic(x_ND)
    x_ND, weights_NK = (x_ND if scale == 1 else x_ND * scale).to(dtype), weights_NK.to(dtype)
    if len(gate_up_E2FD) > 1 and not torch.compiler.is_compiling() and _is_trained(gate_up_E2FD, down_EDF):
        gate_up, down = one_gradient(gate_up_E2FD, dtype), one_gradient(down_EDF, dtype)
        return _GroupedSwiGLU.apply(x_ND, gate_up.weight, down.weight, experts_NK, weights_NK, half, gate_up, down)
    gate_up_E2FD, down_EDF = gate_up_E2FD.to(dtype), down_EDF.to(dtype)
    if len(gate_up_E2FD) == 1:  # nothing to bring together
        # flatten, not [0]: the gradient of a view is a view, and that of an element begins with zeros for all.
        gate_NF, up_NF = linear(x_ND, gate_up_E2FD.flatten(0, 1)).chunk(2, dim=-1)
        return linear(swiglu(gate_NF, up_NF), down_EDF.flatten(0, 1)) * weights_NK
    if torch.compiler.is_compiling():
        return _grouped_swiglu_op(x_ND, gate_up_E2FD, down_EDF, experts_NK, weights_NK)[0]
    if torch.is_grad_enabled():
        return _GroupedSwiGLU.apply(x_ND, gate_up_E2FD, down_EDF, experts_NK, weights_NK, half, None, None)
    if is_few and not half:
        return _one_by_one(x_ND, gate_up_E2FD, down_EDF, experts_NK, weights_NK)
    return _forward(x_ND, gate_up_E2FD, down_EDF, weights_NK, _rows(x_ND, gate_up_E2FD, experts_NK, half))[0]


def _rows(x_ND: Tensor, gate_up_E2FD: Tensor, experts_NK: Tensor, half: bool) -> Rows:
    """The experts' rows in the layout whose products are faster."""
    native = half or is_native(x_ND, gate_up_E2FD, gate_up_E2FD.shape[1])
    return Rows.of(experts_NK, len(gate_up_E2FD), may_batch=not native, half=half)


def _one_by_one(x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """For a token or two: matrices times vectors, where they stand."""
    out_ND = torch.zeros_like(x_ND)
    for x_D, out_D, experts_K, weights_K in zip(x_ND, out_ND, experts_NK.tolist(), weights_NK, strict=True):
        for expert, weight in zip(experts_K, weights_K, strict=True):
            gate_F, up_F = torch.mv(gate_up_E2FD[expert], x_D).chunk(2)
            out_D.addmv_(down_EDF[expert], F.silu(gate_F).mul_(up_F).mul_(weight))
    return out_ND


def _few(x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """:func:`_one_by_one` in C."""
    code, out_ND = kernels(), torch.empty_like(x_ND, memory_format=torch.contiguous_format)
    held = [x.contiguous() for x in (x_ND, gate_up_E2FD, down_EDF, experts_NK.long(), weights_NK)]
    (N, K), (_, D, width) = experts_NK.shape, down_EDF.shape
    threads = torch.get_num_threads() if N * K * D * width >= _MANY else 1
    assert code is not None
    if code.mythos_experts_few(address(out_ND), *map(address, held), N, K, D, width, threads):
        raise MemoryError("no memory for an expert's activations")
    return out_ND


def _forward(
    x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, weights_NK: Tensor, rows: Rows
) -> tuple[Tensor, Tensor]:
    """The result (N, D), and the gates' and ups' products (P, 2F), which the backward pass starts from."""
    hidden_P2F = rows.product(rows.gather(x_ND), gate_up_E2FD.transpose(1, 2))
    act_PF = weighted(hidden_P2F, rows.spread(weights_NK))
    return rows.gather_sum(rows.product(act_PF, down_EDF.transpose(1, 2))), hidden_P2F


def _backward(
    grad_ND: Tensor,
    x_ND: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    weights_NK: Tensor,
    hidden_P2F: Tensor,
    rows: Rows,
    gate_up: OneGradient | None = None,
    down: OneGradient | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Gradients of x, gate_up, down and the mixing weights; those of the weights are None if they go to a sum.

    A mixing weight scales its expert's activation as well as its result, so its gradient is that activation times the
    unmixed gradient, and no expert's result has to be kept. Idle rows have weight 0, which ends every sum over them.
    """
    grad_PD = rows.gather(grad_ND)
    grad_act_PF = rows.product(grad_PD, down_EDF)
    grad_hidden_P2F, grad_weight_P, act_PF = weighted_backward(grad_act_PF, hidden_P2F, rows.spread(weights_NK))
    grad_down = _outer(rows, grad_PD, act_PF, down)
    grad_gate_up = _outer(rows, grad_hidden_P2F, rows.gather(x_ND), gate_up)
    grad_x = rows.gather_sum(rows.product(grad_hidden_P2F, gate_up_E2FD))
    return grad_x, grad_gate_up, grad_down, grad_weight_P[rows.place_NK]


def _outer(rows: Rows, x_PI: Tensor, y_PO: Tensor, one: OneGradient | None) -> Tensor | None:
    """:meth:`Rows.outer`; or None, where the gradient is added up elsewhere or nobody asked for it."""
    if one is None:
        return rows.outer(x_PI, y_PO)
    if one.is_wanted:
        rows.add_outer(x_PI, y_PO, one)
    return None


class _GroupedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        gate_up_E2FD: Tensor,
        down_EDF: Tensor,
        experts_NK: Tensor,
        weights_NK: Tensor,
        half: bool,
        gate_up: OneGradient | None,
        down: OneGradient | None,
    ) -> Tensor:
        ctx.rows, ctx.sums = _rows(x_ND, gate_up_E2FD, experts_NK, half), (gate_up, down)
        out_ND, hidden_P2F = _forward(x_ND, gate_up_E2FD, down_EDF, weights_NK, ctx.rows)
        ctx.save_for_backward(x_ND, gate_up_E2FD, down_EDF, weights_NK, hidden_P2F)
        return out_ND

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, gate_up_E2FD, down_EDF, weights_NK, hidden_P2F = ctx.saved_tensors
        grad_x, grad_gate_up, grad_down, grad_weights = _backward(
            grad_ND, x_ND, gate_up_E2FD, down_EDF, weights_NK, hidden_P2F, ctx.rows, *ctx.sums
        )
        return grad_x, grad_gate_up, grad_down, None, grad_weights, None, None, None


def _is_trained(*weights: Tensor) -> bool:
    return torch.is_grad_enabled() and all(weight.requires_grad and weight.is_leaf for weight in weights)


# Under torch.compile F.grouped_mm refuses everything but bfloat16, so there the whole is one opaque operator. Shapes of
# its results have to be known before it runs, so its rows are never padded.


@torch.library.custom_op("open_mythos::grouped_swiglu", mutates_args=())
def _grouped_swiglu_op(
    x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, experts_NK: Tensor, weights_NK: Tensor
) -> tuple[Tensor, Tensor]:
    rows = Rows.of(experts_NK, len(gate_up_E2FD), may_batch=False)
    out_ND, hidden_P2F = _forward(x_ND, gate_up_E2FD, down_EDF, weights_NK, rows)
    return out_ND, hidden_P2F.contiguous()


@_grouped_swiglu_op.register_fake
def _(
    x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, experts_NK: Tensor, weights_NK: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_ND), x_ND.new_empty(experts_NK.numel(), gate_up_E2FD.shape[1])


@torch.library.custom_op("open_mythos::grouped_swiglu_backward", mutates_args=())
def _grouped_swiglu_backward_op(
    grad_ND: Tensor, x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, experts_NK: Tensor, weights_NK: Tensor,
    hidden_P2F: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows = Rows.of(experts_NK, len(gate_up_E2FD), may_batch=False)
    grads = _backward(grad_ND, x_ND, gate_up_E2FD, down_EDF, weights_NK, hidden_P2F, rows)
    return tuple(grad.contiguous() for grad in grads if grad is not None)  # type: ignore[return-value]


@_grouped_swiglu_backward_op.register_fake
def _(
    grad_ND: Tensor, x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, experts_NK: Tensor, weights_NK: Tensor,
    hidden_P2F: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(x.new_empty(x.shape) for x in (x_ND, gate_up_E2FD, down_EDF, weights_NK))


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _op_backward(ctx: Any, grad_ND: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_gate_up, grad_down, grad_weights = _grouped_swiglu_backward_op(grad_ND, *ctx.saved_tensors)
    return grad_x, grad_gate_up, grad_down, None, grad_weights


_grouped_swiglu_op.register_autograd(_op_backward, setup_context=_save_for_backward)
