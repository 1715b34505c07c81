"""Routed experts that several processes divide: tokens go to where their experts are, and what these say comes back.

Shape letters as in :mod:`open_mythos.ops.experts`, and R rows that a process receives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from open_mythos.ops.dispatch import compute_dtype
from open_mythos.ops.experts import swiglu_experts


class Dispatch:
    """In the place of :func:`~open_mythos.ops.experts.swiglu_experts`, where ``gate_up`` and ``down`` are a part of it.

    Each call exchanges the numbers of rows, the rows, and the results: all processes of the group have to make it, also
    with no token of their own, and as often forward and backward.

    Args:
        group: the processes; the first has the first experts, and so on.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size = group, dist.get_world_size(group)

    @torch.compiler.disable
    def __call__(
        self, x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, experts_NK: Tensor, weights_NK: Tensor,
        scales: tuple[float, float], to_ND: Tensor | None,
    ) -> Tensor:  # fmt: skip
        K, E, dtype = experts_NK.shape[1], len(down_EDF), compute_dtype(x_ND)
        order_P = experts_NK.flatten().argsort(stable=True)
        sent = torch.zeros(self.size * E, dtype=torch.int64, device=x_ND.device)
        sent.scatter_add_(0, experts_NK.flatten(), torch.ones_like(order_P))
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        there, here = torch.stack([sent, received]).view(2, self.size, E).sum(2).tolist()  # the one wait for a GPU
        rows_RD = _Exchange.apply(x_ND.to(dtype)[order_P // K], there, here, self.group)
        expert_R = torch.arange(E, device=x_ND.device).repeat(self.size).repeat_interleave(received)
        ones_R1 = torch.ones(len(rows_RD), 1, dtype=weights_NK.dtype, device=x_ND.device)
        out_RD = swiglu_experts(rows_RD, gate_up_E2FD, down_EDF, expert_R.unsqueeze(1), ones_R1, (scales[0], 1.0))
        out_PD = _Exchange.apply(out_RD, here, there, self.group)
        out_PD = out_PD * (weights_NK * scales[1]).to(dtype).flatten()[order_P].unsqueeze(1)
        to_ND = torch.zeros_like(x_ND, dtype=dtype) if to_ND is None else to_ND
        return to_ND.index_add(0, order_P // K, out_PD.to(to_ND.dtype))


class _Exchange(torch.autograd.Function):
    """Rows for each process, ``there`` of them, against rows from each, ``here``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: list[int], here: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.back = here, there, group
        found = x.new_empty(sum(here), x.shape[1])
        dist.all_to_all_single(found, x.contiguous(), here, there, group)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Exchange.apply(grad, *ctx.back), None, None, None
