"""Tensor parallelism of feed-forwards and vocabularies: each process has a part, and their outputs are summed."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def add_parts(feed_forward: nn.Module, group: dist.ProcessGroup) -> None:
    """Add hooks to a module whose hidden units are divided over ``group``, so that it computes the whole's output.

    All processes of the group call it with the same tokens. Outputs are summed forward, input gradients backward.
    """
    feed_forward.register_forward_pre_hook(lambda module, args: (_Given.apply(args[0], group), *args[1:]))
    feed_forward.register_forward_hook(lambda module, args, out: _Added.apply(out, group))


class Vocabulary:
    """This process's part of a vocabulary, token ids from ``first`` on, in a group of processes that run the same rows.

    Args:
        embed, head: with the rows of these tokens alone. Embedding lookups then work for all tokens; the head returns
            the logits of this part, and :meth:`statistics` those of the whole vocabulary.
    """

    def __init__(self, embed: nn.Embedding, head: nn.Module, group: dist.ProcessGroup) -> None:
        self.group, self.n = group, len(embed.weight)
        self.first, self.embed = self.n * dist.get_rank(group), embed
        embed.forward = self.look_up  # type: ignore[assignment, method-assign]
        head.register_forward_pre_hook(lambda module, args: (_Given.apply(args[0], group), *args[1:]))
        head.statistics = self.statistics  # type: ignore[assignment]

    def place(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Row of each token in this part, an arbitrary one for tokens of other parts; and which tokens are in it."""
        own = ids - self.first
        return own.clamp(0, self.n - 1), (own >= 0) & (own < self.n)

    def look_up(self, ids: Tensor) -> Tensor:
        own, is_here = self.place(ids)
        return _Added.apply(F.embedding(own, self.embed.weight) * is_here.unsqueeze(-1), self.group)

    def statistics(self, logits_NV: Tensor, targets_N: Tensor, theirs_NV: Tensor | None) -> tuple[Tensor, ...]:
        """As :func:`open_mythos.training.objective.statistics` of the whole vocabulary, from this part's logits."""
        (top_N, likeliest_N), (own_N, is_here_N) = logits_NV.detach().max(-1), self.place(targets_N)
        most_N = _reduced(top_N, self.group, dist.ReduceOp.MAX)
        of_target_N = logits_NV.gather(-1, own_N.unsqueeze(-1)).squeeze(-1) * is_here_N
        parts = [(logits_NV - most_N.unsqueeze(-1)).exp().sum(-1), of_target_N]
        if theirs_NV is not None:
            theirs_NV = theirs_NV[:, self.first : self.first + self.n]
            parts.append((theirs_NV.exp() * (theirs_NV - logits_NV)).sum(-1))
        partition_N, of_target_N, *others = _Added.apply(torch.stack(parts), self.group)
        log_partition_N = partition_N.log() + most_N
        divergence_N = others[0] + log_partition_N if others else torch.zeros_like(of_target_N)
        first_N = torch.where(top_N == most_N, likeliest_N + self.first, torch.iinfo(torch.int64).max)
        return log_partition_N, of_target_N, divergence_N, _reduced(first_N, self.group, dist.ReduceOp.MIN)


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduced(grad, ctx.group), None


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _reduced(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _reduced(x: Tensor, group: dist.ProcessGroup, op: Any = dist.ReduceOp.SUM) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, op, group=group)
    return x
