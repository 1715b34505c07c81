"""The gated activation ``silu(gate) * up`` (Shazeer 2020, arXiv:2002.05202), in one pass over memory where C code can.

Shape letters: P rows, F hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.ops.kernels import address, has_kernels, kernels

_ENOUGH = 2**14  # numbers, below which the call costs more than it saves


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` for (..., F)."""
    if torch.is_grad_enabled() and gate.is_contiguous() and up.is_contiguous() and _is_native(gate, up):
        return _SwiGLU.apply(gate, up)
    return F.silu(gate) * up


def weighted(hidden_P2F: Tensor, weight_P1: Tensor) -> Tensor:
    """``weight * silu(gate) * up`` of gates and ups side by side: (P, F). Not differentiable."""
    gate_PF, up_PF = hidden_P2F.chunk(2, dim=-1)
    if not _is_native(hidden_P2F, weight_P1):
        return F.silu(gate_PF).mul_(up_PF).mul_(weight_P1)
    out_PF = torch.empty_like(gate_PF, memory_format=torch.contiguous_format)
    _forward(out_PF, gate_PF, up_PF, weight_P1.contiguous())
    return out_PF


def weighted_backward(grad_PF: Tensor, hidden_P2F: Tensor, weight_P1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For a gradient of :func:`weighted`: those of ``hidden`` and of the weights (P,), and the result again.

    ``grad_PF`` may be overwritten.
    """
    gate_PF, up_PF = hidden_P2F.chunk(2, dim=-1)
    grad_hidden_P2F = torch.empty_like(hidden_P2F, memory_format=torch.contiguous_format)
    grad_gate_PF, grad_up_PF = grad_hidden_P2F.chunk(2, dim=-1)
    if _is_native(hidden_P2F, weight_P1, grad_PF) and hidden_P2F.is_contiguous():
        out_PF, grad_weight_P = torch.empty_like(grad_PF), grad_PF.new_empty(len(grad_PF))
        _backward(grad_gate_PF, grad_up_PF, grad_PF.contiguous(), gate_PF, up_PF, out_PF, grad_weight_P, weight_P1)
        return grad_hidden_P2F, grad_weight_P, out_PF
    silu_PF = F.silu(gate_PF)
    out_PF = silu_PF * up_PF
    grad_weight_P = torch.linalg.vecdot(grad_PF, out_PF)
    grad_PF.mul_(weight_P1)
    torch.mul(grad_PF, silu_PF, out=grad_up_PF)
    grad_gate_PF.copy_(torch.ops.aten.silu_backward(grad_PF.mul_(up_PF), gate_PF))
    return grad_hidden_P2F, grad_weight_P, out_PF.mul_(weight_P1)


def _is_native(x: Tensor, *others: Tensor) -> bool:
    return x.numel() >= _ENOUGH and x.stride(-1) == 1 and has_kernels(x, *others)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        _forward(out.flatten(0, -2), gate.flatten(0, -2), up.flatten(0, -2), None)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        rows = [x.flatten(0, -2) for x in (grad_gate, grad_up, grad.contiguous(), gate, up)]
        _backward(rows[0], rows[1], rows[2], rows[3], rows[4], None, None, None)
        return grad_gate, grad_up


def _forward(out_PF: Tensor, gate_PF: Tensor, up_PF: Tensor, weight_P1: Tensor | None) -> None:
    code, (P, width) = kernels(), gate_PF.shape
    assert code is not None and out_PF.is_contiguous() and gate_PF.stride() == up_PF.stride()
    code.mythos_swiglu(
        address(out_PF), address(gate_PF), address(up_PF), address(weight_P1), P, width,
        gate_PF.stride(0), torch.get_num_threads(),
    )  # fmt: skip


def _backward(
    grad_gate_PF: Tensor, grad_up_PF: Tensor, grad_PF: Tensor, gate_PF: Tensor, up_PF: Tensor, out_PF: Tensor | None,
    grad_weight_P: Tensor | None, weight_P1: Tensor | None,
) -> None:  # fmt: skip
    code, (P, width) = kernels(), gate_PF.shape
    assert code is not None and grad_gate_PF.stride() == grad_up_PF.stride() == gate_PF.stride() == up_PF.stride()
    weight_P1 = None if weight_P1 is None else weight_P1.contiguous()
    code.mythos_swiglu_backward(
        address(grad_gate_PF), address(grad_up_PF), address(out_PF), address(grad_weight_P), address(grad_PF),
        address(gate_PF), address(up_PF), address(weight_P1), P, width, gate_PF.stride(0),
        torch.get_num_threads(),
    )  # fmt: skip
