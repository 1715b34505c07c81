"""Mixture-of-experts arithmetic: one grouped matrix product over tokens sorted by expert.

Shape letters: N tokens, K experts per token, E experts, D model width, F expert width, M = N * K rows.
The slow, obvious twin is :func:`open_mythos.ops.reference.moe_loop`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_ALIGN = 16  # bytes; grouped_mm wants every stride to be a multiple of this


def grouped_swiglu(
    x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, experts_NK: Tensor, weights_NK: Tensor
) -> Tensor:
    """Sum over each token's K experts of ``weight * down(silu(gate(x)) * up(x))``.

    Tokens are sorted by expert once, all experts are multiplied in one grouped product, and the results are
    added back in place. No loop over experts, no wait for the device, experts without tokens cost nothing.

    Args:
        x_ND: tokens.
        gate_up_E2FD: gate (first F rows) and up projections of every expert.
        down_EDF: down projections.
        experts_NK: chosen experts, integers in [0, E).
        weights_NK: mixing weights.

    Returns:
        (N, D) in x's dtype.
    """
    n_experts, K = len(gate_up_E2FD), experts_NK.shape[1]
    if n_experts == 1:  # nothing to sort
        gate_NF, up_NF = F.linear(x_ND, gate_up_E2FD[0]).chunk(2, dim=-1)
        return F.linear(F.silu(gate_NF) * up_NF, down_EDF[0]) * weights_NK.to(x_ND.dtype)
    order_M = experts_NK.flatten().argsort(stable=True)
    token_M = order_M // K
    ends_E = expert_counts(experts_NK, n_experts).cumsum(0).to(torch.int32)
    gate_MF, up_MF = grouped_matmul(x_ND[token_M], gate_up_E2FD, ends_E).chunk(2, dim=-1)
    out_MD = grouped_matmul(F.silu(gate_MF) * up_MF, down_EDF, ends_E)
    out_MD = out_MD * weights_NK.flatten()[order_M].unsqueeze(-1).to(out_MD.dtype)
    return torch.zeros_like(x_ND).index_add(0, token_M, out_MD.to(x_ND.dtype))


def expert_counts(experts_NK: Tensor, n_experts: int) -> Tensor:
    """How many of the choices fall on each expert: (E,) int64."""
    counts_E = torch.zeros(n_experts, dtype=torch.int64, device=experts_NK.device)
    return counts_E.scatter_add(0, experts_NK.flatten(), torch.ones_like(experts_NK.flatten()))


def grouped_matmul(x_MI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """``x[rows of e] @ weight[e].T`` for every expert e at once.

    Args:
        x_MI: rows, those of expert 0 first.
        weight_EOI: one matrix per expert.
        ends_E: int32, where each expert's rows end.

    Returns:
        (M, O).
    """
    if torch.compiler.is_compiling():
        return _grouped_matmul_op(x_MI, weight_EOI, ends_E)
    return _grouped_mm(x_MI, weight_EOI, ends_E)


def _grouped_mm(x_MI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """``F.grouped_mm`` for any width: pads the widths that its 16-byte strides do not allow."""
    n_out = weight_EOI.shape[1]
    multiple = _ALIGN // x_MI.element_size()
    pad_in, pad_out = -x_MI.shape[1] % multiple, -n_out % multiple
    if pad_in or pad_out:
        x_MI = F.pad(x_MI, (0, pad_in))
        weight_EOI = F.pad(weight_EOI, (0, pad_in, 0, pad_out))
    return F.grouped_mm(x_MI.contiguous(), weight_EOI.transpose(-2, -1), offs=ends_E)[:, :n_out]


# Under torch.compile F.grouped_mm refuses everything but bfloat16, so there it is an opaque operator.


@torch.library.custom_op("open_mythos::grouped_matmul", mutates_args=())
def _grouped_matmul_op(x_MI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    return _grouped_mm(x_MI, weight_EOI, ends_E).contiguous()


@_grouped_matmul_op.register_fake
def _(x_MI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    return x_MI.new_empty(x_MI.shape[0], weight_EOI.shape[1])


@torch.library.custom_op("open_mythos::grouped_matmul_backward", mutates_args=())
def _grouped_matmul_backward(
    grad_MO: Tensor, x_MI: Tensor, weight_EOI: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor]:
    (n_out, n_in), multiple = weight_EOI.shape[1:], _ALIGN // x_MI.element_size()
    pad_in, pad_out = -n_in % multiple, -n_out % multiple
    grad, x = F.pad(grad_MO, (0, pad_out)).contiguous(), F.pad(x_MI, (0, pad_in)).contiguous()
    weight = F.pad(weight_EOI, (0, pad_in, 0, pad_out)).contiguous()
    grad_x = F.grouped_mm(grad, weight, offs=ends_E)[:, :n_in]
    grad_weight = F.grouped_mm(grad.t(), x, offs=ends_E)[:, :n_out, :n_in]
    return grad_x.contiguous(), grad_weight.contiguous()


@_grouped_matmul_backward.register_fake
def _(grad_MO: Tensor, x_MI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_MI), torch.empty_like(weight_EOI, memory_format=torch.contiguous_format)


def _save_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_MO: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_grouped_matmul_backward(grad_MO, *ctx.saved_tensors), None


_grouped_matmul_op.register_autograd(_backward, setup_context=_save_inputs)
