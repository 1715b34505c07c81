"""Mixture-of-experts arithmetic: all experts in a few matrix products over rows brought together by expert.

Shape letters: N tokens, K experts per token, E experts, C rows given to each, P rows of all, D model width, F expert
width. The slow, obvious twin is :func:`open_mythos.ops.reference.moe_loop`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ALIGN = 16  # bytes; grouped_mm wants every stride to be a multiple of this
_SMALL = 128  # rows of an expert from which on its own matrix product is as fast as a batch of padded ones
_WASTE = 2.5  # padded rows for a real one, from which on padding costs more than it saves


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
        (N, D) in x's dtype.
    """
    x_ND = x_ND * scale
    weights_NK = weights_NK.to(x_ND.dtype)
    if len(gate_up_E2FD) == 1:  # nothing to bring together
        gate_NF, up_NF = F.linear(x_ND, gate_up_E2FD[0]).chunk(2, dim=-1)
        return F.linear(F.silu(gate_NF) * up_NF, down_EDF[0]) * weights_NK
    if torch.compiler.is_compiling():
        return _grouped_swiglu_op(x_ND, gate_up_E2FD, down_EDF, experts_NK, weights_NK)[0]
    if torch.is_grad_enabled():
        return _GroupedSwiGLU.apply(x_ND, gate_up_E2FD, down_EDF, experts_NK, weights_NK)
    return _forward(x_ND, gate_up_E2FD, down_EDF, weights_NK, Rows.of(experts_NK, len(gate_up_E2FD)))[0]


def expert_counts(experts_NK: Tensor, n_experts: int) -> Tensor:
    """How many of the choices fall on each expert: (E,) int64."""
    counts_E = torch.zeros(n_experts, dtype=torch.int64, device=experts_NK.device)
    return counts_E.scatter_add(0, experts_NK.flatten(), torch.ones_like(experts_NK.flatten()))


@dataclass
class Rows:
    """Which token stands in which row, rows of one expert side by side.

    Either as many rows as there are choices, for products of groups of any size; or C rows for every expert, the last
    ones idle where it has fewer tokens, for one batched product, which is faster where experts have few tokens.

    Attributes:
        token_P: token of each row; any at idle ones.
        place_NK: row of each choice.
        ends_E: int32, where each expert's rows end; None if every expert has C.
        n_experts: E.
    """

    token_P: Tensor
    place_NK: Tensor
    ends_E: Tensor | None
    n_experts: int

    @staticmethod
    def of(experts_NK: Tensor, n_experts: int, may_pad: bool = True) -> Rows:
        """Rows for the choices ``experts_NK``; without idle ones unless ``may_pad``."""
        device, n_choices, K = experts_NK.device, experts_NK.numel(), experts_NK.shape[1]
        expert_M, order_M = experts_NK.flatten().sort(stable=True)
        counts_E = expert_counts(experts_NK, n_experts)
        ends_E = counts_E.cumsum(0)
        row_M, n_rows = torch.arange(n_choices, device=device), n_choices
        # The width of a batch has to be known here, for which one would have to wait for a GPU.
        if may_pad and device.type == "cpu" and n_choices < _SMALL * n_experts:
            most = int(counts_E.max())
            if most * n_experts <= _WASTE * n_choices:
                row_M = row_M + (torch.arange(n_experts) * most - ends_E + counts_E)[expert_M]
                n_rows, ends_E = most * n_experts, None
        token_P = torch.zeros(n_rows, dtype=torch.int64, device=device).scatter_(0, row_M, order_M // K)
        place_M = torch.empty_like(row_M).scatter_(0, order_M, row_M)
        ends_E = None if ends_E is None else ends_E.to(torch.int32)
        return Rows(token_P, place_M.view_as(experts_NK), ends_E, n_experts)

    def spread(self, x_NK: Tensor) -> Tensor:
        """A number for each choice to one for each row, (P, 1); 0 at idle ones."""
        return x_NK.new_zeros(len(self.token_P)).scatter_(0, self.place_NK.flatten(), x_NK.flatten()).unsqueeze(1)

    def gather_sum(self, x_PD: Tensor) -> Tensor:
        """Every token's sum over its rows: (N, D)."""
        return F.embedding_bag(self.place_NK, x_PD, mode="sum")

    def product(self, x_PI: Tensor, weight_EIO: Tensor) -> Tensor:
        """Rows times the matrix of their expert: (P, O)."""
        if self.ends_E is not None:
            return _grouped_mm(x_PI, weight_EIO, self.ends_E)
        return torch.bmm(x_PI.unflatten(0, (self.n_experts, -1)), weight_EIO).flatten(0, 1)

    def outer(self, x_PI: Tensor, y_PO: Tensor) -> Tensor:
        """For every expert the sum over its rows of ``x y^T``: (E, I, O)."""
        if self.ends_E is not None:
            return _grouped_outer(x_PI, y_PO, self.ends_E)
        x_EIC = x_PI.unflatten(0, (self.n_experts, -1)).transpose(1, 2)
        return torch.bmm(x_EIC, y_PO.unflatten(0, (self.n_experts, -1)))


def _forward(
    x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, weights_NK: Tensor, rows: Rows
) -> tuple[Tensor, Tensor]:
    """The result (N, D), and the gates' and ups' products (P, 2F), which the backward pass starts from."""
    hidden_P2F = rows.product(x_ND[rows.token_P], gate_up_E2FD.transpose(1, 2))
    gate_PF, up_PF = hidden_P2F.chunk(2, dim=-1)
    act_PF = F.silu(gate_PF).mul_(up_PF).mul_(rows.spread(weights_NK))
    return rows.gather_sum(rows.product(act_PF, down_EDF.transpose(1, 2))), hidden_P2F


def _backward(
    grad_ND: Tensor,
    x_ND: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    weights_NK: Tensor,
    hidden_P2F: Tensor,
    rows: Rows,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate_up, down and the mixing weights.

    A mixing weight scales its expert's activation as well as its result, so its gradient is that activation times the
    unmixed gradient, and no expert's result has to be kept. Idle rows have weight 0, which ends every sum over them.
    """
    weight_P1 = rows.spread(weights_NK)
    gate_PF, up_PF = hidden_P2F.chunk(2, dim=-1)
    silu_PF = F.silu(gate_PF)
    act_PF = silu_PF * up_PF
    grad_PD = grad_ND[rows.token_P]
    grad_act_PF = rows.product(grad_PD, down_EDF)
    grad_weights_NK = torch.linalg.vecdot(grad_act_PF, act_PF)[rows.place_NK]
    grad_down = rows.outer(grad_PD, act_PF.mul_(weight_P1))
    grad_act_PF.mul_(weight_P1)
    grad_hidden_P2F = torch.empty_like(hidden_P2F)
    grad_gate_PF, grad_up_PF = grad_hidden_P2F.chunk(2, dim=-1)
    torch.mul(grad_act_PF, silu_PF, out=grad_up_PF)
    grad_gate_PF.copy_(torch.ops.aten.silu_backward(grad_act_PF.mul_(up_PF), gate_PF))
    grad_gate_up = rows.outer(grad_hidden_P2F, x_ND[rows.token_P])
    grad_x = rows.gather_sum(rows.product(grad_hidden_P2F, gate_up_E2FD))
    return grad_x, grad_gate_up, grad_down, grad_weights_NK


class _GroupedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, experts_NK: Tensor, weights_NK: Tensor
    ) -> Tensor:
        rows = Rows.of(experts_NK, len(gate_up_E2FD))
        out_ND, hidden_P2F = _forward(x_ND, gate_up_E2FD, down_EDF, weights_NK, rows)
        ctx.rows = rows
        ctx.save_for_backward(x_ND, gate_up_E2FD, down_EDF, weights_NK, hidden_P2F)
        return out_ND

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_gate_up, grad_down, grad_weights = _backward(grad_ND, *ctx.saved_tensors, ctx.rows)
        return grad_x, grad_gate_up, grad_down, None, grad_weights


def _grouped_mm(x_PI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """``F.grouped_mm`` for any width: pads the widths that its 16-byte strides do not allow."""
    n_in, n_out = weight_EIO.shape[1:]
    multiple = _ALIGN // x_PI.element_size()
    pad_in, pad_out = -n_in % multiple, -n_out % multiple
    if pad_in or pad_out:
        x_PI = F.pad(x_PI, (0, pad_in))
        weight_EIO = F.pad(weight_EIO, (0, pad_out, 0, pad_in))
    return F.grouped_mm(x_PI.contiguous(), weight_EIO, offs=ends_E)[:, :n_out]


def _grouped_outer(x_PI: Tensor, y_PO: Tensor, ends_E: Tensor) -> Tensor:
    """``x^T y`` over the rows of each group, for any width: (E, I, O)."""
    (n_in, n_out), multiple = (x_PI.shape[1], y_PO.shape[1]), _ALIGN // x_PI.element_size()
    x_PI, y_PO = F.pad(x_PI, (0, -n_in % multiple)), F.pad(y_PO, (0, -n_out % multiple))
    return F.grouped_mm(x_PI.contiguous().t(), y_PO.contiguous(), offs=ends_E)[:, :n_in, :n_out]


# Under torch.compile F.grouped_mm refuses everything but bfloat16, so there the whole is one opaque operator. Shapes of
# its results have to be known before it runs, so its rows are never padded.


@torch.library.custom_op("open_mythos::grouped_swiglu", mutates_args=())
def _grouped_swiglu_op(
    x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, experts_NK: Tensor, weights_NK: Tensor
) -> tuple[Tensor, Tensor]:
    rows = Rows.of(experts_NK, len(gate_up_E2FD), may_pad=False)
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
    rows = Rows.of(experts_NK, len(gate_up_E2FD), may_pad=False)
    grads = _backward(grad_ND, x_ND, gate_up_E2FD, down_EDF, weights_NK, hidden_P2F, rows)
    return tuple(grad.contiguous() for grad in grads)  # type: ignore[return-value]


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
