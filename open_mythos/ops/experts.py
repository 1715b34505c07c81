"""Mixture-of-experts arithmetic: all experts in a few matrix products over rows brought together by expert.

Shape letters: N tokens, K experts per token, E experts, C rows given to each, P rows of all, D model width, F expert
width. The slow, obvious twin is :func:`open_mythos.ops.reference.moe_loop`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.ops.linear import product_dtype
from open_mythos.ops.one_gradient import OneGradient, add_product, one_gradient

_ALIGN = 16  # bytes; grouped_mm wants every stride to be a multiple of this
_FEW = 8  # choices up to which bringing rows together costs more than it saves
_CALL = 48  # a product of its own for an expert takes as much longer as this many rows would


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
        (N, D) in x's dtype, or autocast's.
    """
    dtype = product_dtype(x_ND)
    x_ND, weights_NK = (x_ND * scale).to(dtype), weights_NK.to(dtype)
    if len(gate_up_E2FD) > 1 and not torch.compiler.is_compiling() and _is_trained(gate_up_E2FD, down_EDF):
        gate_up, down = one_gradient(gate_up_E2FD, dtype), one_gradient(down_EDF, dtype)
        return _GroupedSwiGLU.apply(x_ND, gate_up.weight, down.weight, experts_NK, weights_NK, gate_up, down)
    gate_up_E2FD, down_EDF = gate_up_E2FD.to(dtype), down_EDF.to(dtype)
    if len(gate_up_E2FD) == 1:  # nothing to bring together
        # flatten, not [0]: the gradient of a view is a view, and that of an element begins with zeros for all.
        gate_NF, up_NF = F.linear(x_ND, gate_up_E2FD.flatten(0, 1)).chunk(2, dim=-1)
        return F.linear(F.silu(gate_NF) * up_NF, down_EDF.flatten(0, 1)) * weights_NK
    if torch.compiler.is_compiling():
        return _grouped_swiglu_op(x_ND, gate_up_E2FD, down_EDF, experts_NK, weights_NK)[0]
    if torch.is_grad_enabled():
        return _GroupedSwiGLU.apply(x_ND, gate_up_E2FD, down_EDF, experts_NK, weights_NK, None, None)
    if experts_NK.numel() <= _FEW and experts_NK.device.type == "cpu":
        return _one_by_one(x_ND, gate_up_E2FD, down_EDF, experts_NK, weights_NK)
    return _forward(x_ND, gate_up_E2FD, down_EDF, weights_NK, Rows.of(experts_NK, len(gate_up_E2FD)))[0]


def _one_by_one(x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """For a token or two: matrices times vectors, where they stand."""
    out_ND = torch.zeros_like(x_ND)
    for x_D, out_D, experts_K, weights_K in zip(x_ND, out_ND, experts_NK.tolist(), weights_NK, strict=True):
        for expert, weight in zip(experts_K, weights_K, strict=True):
            gate_F, up_F = torch.mv(gate_up_E2FD[expert], x_D).chunk(2)
            out_D.addmv_(down_EDF[expert], F.silu(gate_F).mul_(up_F).mul_(weight))
    return out_ND


def expert_counts(experts_NK: Tensor, n_experts: int) -> Tensor:
    """How many of the choices fall on each expert: (E,) int64."""
    counts_E = torch.zeros(n_experts, dtype=torch.int64, device=experts_NK.device)
    return counts_E.scatter_add(0, experts_NK.flatten(), torch.ones_like(experts_NK.flatten()))


@dataclass
class Rows:
    """Which token stands in which row, rows of one expert side by side.

    There are two layouts. *Grouped* has as many rows as there are choices, for products of groups of any size.
    *Batched* gives every expert C rows, idle ones at the end where it has fewer tokens, for one batched product, which
    is several times as fast where experts have few tokens; the rest of the more popular experts' rows follows.

    Attributes:
        token_P: token of each row; N, behind the last, at idle ones.
        place_NK: row of each choice.
        n_experts: E.
        ends_E: int32, where each expert's rows end; None if batched.
        width: C; 0 if grouped.
        rest: expert, first row and end of those that have more than C.
    """

    token_P: Tensor
    place_NK: Tensor
    n_experts: int
    ends_E: Tensor | None = None
    width: int = 0
    rest: list[tuple[int, int, int]] = field(default_factory=list)

    @staticmethod
    def of(experts_NK: Tensor, n_experts: int, may_batch: bool = True) -> Rows:
        """Rows for the choices ``experts_NK``, in the layout that is faster, or grouped."""
        device, n_choices, K = experts_NK.device, experts_NK.numel(), experts_NK.shape[1]
        expert_M, order_M = experts_NK.flatten().sort(stable=True)
        counts_E = expert_counts(experts_NK, n_experts)
        ends_E = counts_E.cumsum(0)
        row_M, n_rows, width, rest = torch.arange(n_choices, device=device), n_choices, 0, []
        # The layout depends on the counts, for which one would have to wait for a GPU, and there is no need to.
        if may_batch and device.type == "cpu":
            width = _best_width(counts_E)
        if width:
            rank_M = row_M - (ends_E - counts_E)[expert_M]
            over_M = rank_M >= width
            first_rest = n_experts * width
            row_M = torch.where(over_M, first_rest + over_M.cumsum(0) - 1, expert_M * width + rank_M)
            more_E = (counts_E - width).clamp(min=0)
            n_rows = first_rest + int(more_E.sum())
            ends = (first_rest + more_E.cumsum(0)).tolist()
            rest = [(e, end - n, end) for e, (n, end) in enumerate(zip(more_E.tolist(), ends, strict=True)) if n]
        token_P = torch.full((n_rows,), len(experts_NK), device=device).scatter_(0, row_M, order_M // K)
        place_NK = torch.empty_like(row_M).scatter_(0, order_M, row_M).view_as(experts_NK)
        return Rows(token_P, place_NK, n_experts, None if width else ends_E.to(torch.int32), width, rest)

    def gather(self, x_ND: Tensor) -> Tensor:
        """Every row's token: (P, D), zeros at idle rows, which must not overflow in the expert of others."""
        return (F.pad(x_ND, (0, 0, 0, 1)) if self.width else x_ND).index_select(0, self.token_P)

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
        out_PO = x_PI.new_empty(len(x_PI), weight_EIO.shape[2])
        torch.bmm(self._batched(x_PI), weight_EIO, out=self._batched(out_PO))
        for expert, start, end in self.rest:
            torch.mm(x_PI[start:end], weight_EIO[expert], out=out_PO[start:end])
        return out_PO

    def outer(self, x_PI: Tensor, y_PO: Tensor) -> Tensor:
        """For every expert the sum over its rows of ``x y^T``: (E, I, O)."""
        if self.ends_E is not None:
            return _grouped_outer(x_PI, y_PO, self.ends_E)
        out_EIO = torch.bmm(self._batched(x_PI).transpose(1, 2), self._batched(y_PO))
        for expert, start, end in self.rest:
            out_EIO[expert].addmm_(x_PI[start:end].t(), y_PO[start:end])
        return out_EIO

    def add_outer(self, x_PI: Tensor, y_PO: Tensor, into: OneGradient) -> None:
        """:meth:`outer`, as another share of a gradient."""
        if self.ends_E is not None:
            into.sum.add_(self.outer(x_PI, y_PO))
            return
        into.add_products(self._batched(x_PI), self._batched(y_PO))
        for expert, start, end in self.rest:
            add_product(into.sum[expert], x_PI[start:end].t(), y_PO[start:end])

    def _batched(self, x_PI: Tensor) -> Tensor:
        """The first C rows of every expert: (E, C, I)."""
        return x_PI[: self.n_experts * self.width].unflatten(0, (self.n_experts, self.width))


def _best_width(counts_E: Tensor) -> int:
    """The C of the batched layout that costs least, in rows; 0 if the grouped one costs less."""
    some_C = counts_E.unique()
    over_CE = (counts_E - some_C.unsqueeze(1)).clamp(min=0)
    cost_C = len(counts_E) * some_C + over_CE.sum(1) + _CALL * over_CE.gt(0).sum(1)
    best = cost_C.argmin()
    grouped = counts_E.sum() + _CALL * counts_E.gt(0).sum()
    return int(some_C[best]) if cost_C[best] < grouped else 0


def _forward(
    x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, weights_NK: Tensor, rows: Rows
) -> tuple[Tensor, Tensor]:
    """The result (N, D), and the gates' and ups' products (P, 2F), which the backward pass starts from."""
    hidden_P2F = rows.product(rows.gather(x_ND), gate_up_E2FD.transpose(1, 2))
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
    gate_up: OneGradient | None = None,
    down: OneGradient | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Gradients of x, gate_up, down and the mixing weights; those of the weights are None if they go to a sum.

    A mixing weight scales its expert's activation as well as its result, so its gradient is that activation times the
    unmixed gradient, and no expert's result has to be kept. Idle rows have weight 0, which ends every sum over them.
    """
    weight_P1 = rows.spread(weights_NK)
    gate_PF, up_PF = hidden_P2F.chunk(2, dim=-1)
    silu_PF = F.silu(gate_PF)
    act_PF = silu_PF * up_PF
    grad_PD = rows.gather(grad_ND)
    grad_act_PF = rows.product(grad_PD, down_EDF)
    grad_weights_NK = torch.linalg.vecdot(grad_act_PF, act_PF)[rows.place_NK]
    grad_down = _outer(rows, grad_PD, act_PF.mul_(weight_P1), down)
    grad_act_PF.mul_(weight_P1)
    grad_hidden_P2F = torch.empty_like(hidden_P2F)
    grad_gate_PF, grad_up_PF = grad_hidden_P2F.chunk(2, dim=-1)
    torch.mul(grad_act_PF, silu_PF, out=grad_up_PF)
    grad_gate_PF.copy_(torch.ops.aten.silu_backward(grad_act_PF.mul_(up_PF), gate_PF))
    grad_gate_up = _outer(rows, grad_hidden_P2F, rows.gather(x_ND), gate_up)
    grad_x = rows.gather_sum(rows.product(grad_hidden_P2F, gate_up_E2FD))
    return grad_x, grad_gate_up, grad_down, grad_weights_NK


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
        gate_up: OneGradient | None,
        down: OneGradient | None,
    ) -> Tensor:
        ctx.rows, ctx.sums = Rows.of(experts_NK, len(gate_up_E2FD)), (gate_up, down)
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
        return grad_x, grad_gate_up, grad_down, None, grad_weights, None, None


def _is_trained(*weights: Tensor) -> bool:
    return torch.is_grad_enabled() and all(weight.requires_grad and weight.is_leaf for weight in weights)


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
