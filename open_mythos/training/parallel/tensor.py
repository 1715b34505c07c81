"""Feed-forwards that several processes divide: each has a part of the hidden units, and they add up what these say."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def add_parts(feed_forward: nn.Module, group: dist.ProcessGroup) -> None:
    """Have calls of a module, of which each process of ``group`` has some of the hidden units, be those of the whole.

    All of the group call it with the same tokens. The gradient of these is added up on the way back.
    """
    feed_forward.register_forward_pre_hook(lambda module, args: (_Given.apply(args[0], group), *args[1:]))
    feed_forward.register_forward_hook(lambda module, args, out: _Added.apply(out, group))


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.group), None


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x
