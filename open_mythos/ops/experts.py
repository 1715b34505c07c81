"""Mixture-of-experts arithmetic: all experts in a few matrix products over tokens sorted by expert.

Shape letters: N tokens, K experts per token, E experts, P = N K choices, D model width, F expert width.
The plain, slow reference is :func:`open_mythos.ops.reference.moe_loop`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.ops.dispatch import compute_dtype, grouping_waits

MAX_GATHERED = 8  # choices up to which copying their experts' matrices costs less than sorting tokens by expert
# Bytes of copied matrices up to which that holds on a GPU too, where sorting takes some fifteen launches more. An
# estimate: copies are written and read again, some MB in the time of a launch.
_GATHERED_BYTES = 2**26
_ALIGN = 16  # bytes; F.grouped_mm requires strides that are multiples of this


def swiglu_experts(
    x_ND: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    experts_NK: Tensor,
    weights_NK: Tensor,
    scales: tuple[float, float] = (1.0, 1.0),
    to_ND: Tensor | None = None,
) -> Tensor:
    """Sum over each token's K experts of ``weight * down(silu(gate(x)) * up(x))``.

    Args:
        x_ND: tokens.
        gate_up_E2FD: gate (first F rows) and up projections of every expert.
        down_EDF: down projections.
        experts_NK: chosen experts, integers in [0, E).
        weights_NK: mixing weights.
        scales: factors of ``gate_up`` and of ``down``.
        to_ND: added to the sum.

    Returns:
        (N, D).
    """
    N, K = experts_NK.shape
    E = len(down_EDF)
    if E == 1:
        hidden_N2F = F.linear(x_ND * scales[0], gate_up_E2FD.flatten(0, 1))
        act_NF = _swiglu(hidden_N2F) * (weights_NK * scales[1]).to(hidden_N2F.dtype)
        out_ND = F.linear(act_NF, down_EDF.flatten(0, 1))
        return out_ND if to_ND is None else out_ND + to_ND
    if _are_gathered(x_ND, N * K, 1.5 * gate_up_E2FD.nbytes / E):
        return _gathered(x_ND, gate_up_E2FD, down_EDF, experts_NK, weights_NK, scales, to_ND)
    order_P = experts_NK.flatten().argsort(stable=True)
    ends_E = torch.zeros(E, dtype=torch.int64, device=x_ND.device)
    ends_E = ends_E.scatter_add(0, experts_NK.flatten(), torch.ones_like(order_P)).cumsum(0).to(torch.int32)
    return swiglu_sorted(x_ND, gate_up_E2FD, down_EDF, order_P, ends_E, weights_NK, scales, to_ND)


def swiglu_sorted(
    x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, order_P: Tensor, ends_E: Tensor, weights_NK: Tensor,
    scales: tuple[float, float], to_ND: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """:func:`swiglu_experts` for choices that are sorted by expert, those of expert e ending at ``ends_E[e]``.

    ``order_P`` are flat indices into (N, K), some or all of them.
    """
    dtype, token_P = compute_dtype(x_ND), order_P // weights_NK.shape[1]
    gate_up_E2FD, down_EDF, x_ND = gate_up_E2FD.to(dtype), down_EDF.to(dtype), x_ND.to(dtype)
    hidden_P2F = grouped_mm((x_ND * scales[0])[token_P], gate_up_E2FD.transpose(1, 2), ends_E)
    weight_P1 = (weights_NK * scales[1]).to(dtype).flatten()[order_P].unsqueeze(1)
    out_PD = grouped_mm(_swiglu(hidden_P2F) * weight_P1, down_EDF.transpose(1, 2), ends_E)
    to_ND = torch.zeros_like(x_ND) if to_ND is None else to_ND
    return to_ND.index_add(0, token_P, out_PD.to(to_ND.dtype))


def _are_gathered(x_ND: Tensor, n_choices: int, expert_bytes: float) -> bool:
    """Whether to copy the matrices of the chosen experts rather than to sort tokens by expert."""
    if x_ND.requires_grad or not 0 < n_choices <= MAX_GATHERED:
        return False
    return x_ND.device.type == "cpu" or n_choices * expert_bytes <= _GATHERED_BYTES or grouping_waits(x_ND)


def _swiglu(hidden_P2F: Tensor) -> Tensor:
    gate_PF, up_PF = hidden_P2F.chunk(2, dim=-1)
    return F.silu(gate_PF) * up_PF


def _gathered(
    x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, experts_NK: Tensor, weights_NK: Tensor,
    scales: tuple[float, float], to_ND: Tensor | None,
) -> Tensor:  # fmt: skip
    """:func:`swiglu_experts` for a few tokens: products with copies of their experts' matrices."""
    (N, K), experts_P, zero = experts_NK.shape, experts_NK.flatten(), x_ND.detach().flatten()[:1]
    x_P1D = x_ND.unsqueeze(1).expand(-1, K, -1).reshape(N * K, 1, -1)
    hidden_P12F = torch.baddbmm(zero, x_P1D, gate_up_E2FD[experts_P].transpose(1, 2), beta=0, alpha=scales[0])
    out_P1D = torch.bmm(_swiglu(hidden_P12F), down_EDF[experts_P].transpose(1, 2))
    to_N1D = zero if to_ND is None else to_ND.unsqueeze(1)
    weights_N1K, out_NKD = weights_NK.to(out_P1D.dtype).unsqueeze(1), out_P1D.view(N, K, -1)
    return torch.baddbmm(to_N1D, weights_N1K, out_NKD, beta=0 if to_ND is None else 1, alpha=scales[1]).squeeze(1)


# F.grouped_mm as an operator of our own: PyTorch's rejects float32 under tracing, and strides that are not multiples of
# 16 bytes everywhere. Not by torch.library.custom_op, whose first call imports the compiler, which takes two seconds.
# Named after the module, since an exported model brings its own copy.
_NAMESPACE = __name__.replace(".", "_")
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")
_OPERATORS = getattr(torch.ops, _NAMESPACE)


def _define(schema: str, kernel: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_LIBRARY)


def grouped_mm(x_PK: Tensor, weight_EKN: Tensor, ends_E: Tensor) -> Tensor:
    """Each row times the matrix of its group, where the rows of group e end at ``ends_E[e]``: (P, N)."""
    return _OPERATORS.grouped_mm(x_PK, weight_EKN, ends_E)


def _grouped_mm(x_PK: Tensor, weight_EKN: Tensor, ends_E: Tensor) -> Tensor:
    if x_PK.dtype == torch.float64:  # not supported by F.grouped_mm
        return torch.cat([x @ weight for x, weight in zip(_groups(x_PK, ends_E), weight_EKN, strict=True)])
    n_out, multiple = weight_EKN.shape[2], _ALIGN // x_PK.element_size()
    pad_in, pad_out = -x_PK.shape[1] % multiple, -n_out % multiple
    if pad_in or pad_out:
        x_PK, weight_EKN = F.pad(x_PK, (0, pad_in)), F.pad(weight_EKN, (0, pad_out, 0, pad_in))
    out_PN = F.grouped_mm(x_PK.contiguous(), weight_EKN, offs=ends_E)
    return out_PN[:, :n_out].contiguous() if pad_out else out_PN


def _fake_mm(x_PK: Tensor, weight_EKN: Tensor, ends_E: Tensor) -> Tensor:
    return x_PK.new_empty(x_PK.shape[0], weight_EKN.shape[2])


def _groups(x_PK: Tensor, ends_E: Tensor) -> tuple[Tensor, ...]:
    return x_PK.split(ends_E.diff(prepend=ends_E.new_zeros(1)).tolist())


def _grouped_outer(x_PM: Tensor, y_PN: Tensor, ends_E: Tensor) -> Tensor:
    """``x^T y`` over the rows of each group: (E, M, N)."""
    if x_PM.dtype == torch.float64:
        return torch.stack([x.t() @ y for x, y in zip(_groups(x_PM, ends_E), _groups(y_PN, ends_E), strict=True)])
    (M, N), multiple = (x_PM.shape[1], y_PN.shape[1]), _ALIGN // x_PM.element_size()
    x_PM, y_PN = F.pad(x_PM, (0, -M % multiple)), F.pad(y_PN, (0, -N % multiple))
    return F.grouped_mm(x_PM.contiguous().t(), y_PN.contiguous(), offs=ends_E)[:, :M, :N].contiguous()


def _fake_outer(x_PM: Tensor, y_PN: Tensor, ends_E: Tensor) -> Tensor:
    return x_PM.new_empty(ends_E.shape[0], x_PM.shape[1], y_PN.shape[1])


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_PN: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_PK, weight_EKN, ends_E = ctx.saved_tensors
    needs_x, needs_weight, _ = ctx.needs_input_grad
    grad_x = grouped_mm(grad_PN, weight_EKN.transpose(1, 2), ends_E) if needs_x else None
    # In this order, the gradient is contiguous in the layout in which the weight is stored, (E, N, K).
    grad_weight = _OPERATORS.grouped_outer(grad_PN, x_PK, ends_E).transpose(1, 2) if needs_weight else None
    return grad_x, grad_weight, None


_define("grouped_mm(Tensor x, Tensor weight, Tensor ends) -> Tensor", _grouped_mm, _fake_mm)
_define("grouped_outer(Tensor x, Tensor y, Tensor ends) -> Tensor", _grouped_outer, _fake_outer)
torch.library.register_autograd(f"{_NAMESPACE}::grouped_mm", _backward, setup_context=_save_for_backward, lib=_LIBRARY)
