"""Tokens brought together by the expert they go to, and products of each expert's rows with its matrix.

Shape letters: N tokens, K experts per token, M choices of all, E experts, C rows given to each, P rows of all, D model
width, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.ops.kernels import has_kernels, kernels
from open_mythos.ops.one_gradient import OneGradient
from open_mythos.ops.product import add_product, grouped_outer, grouped_product

_MANY = 2**14  # numbers from which on several threads look for the greatest
_CALL = 48  # a product of its own for an expert takes as much longer as this many rows would


def greatest(logits: Tensor, bias_E: Tensor, k: int) -> Tensor:
    """Places of the ``k`` greatest of ``logits + bias`` (..., E), the greatest first: (..., k) int64."""
    logits, E = logits.detach(), logits.shape[-1]
    if logits.numel() and k <= E and has_kernels(logits, bias_E):
        code, logits_NE, bias_E = kernels(), logits.reshape(-1, E).contiguous(), bias_E.contiguous()
        assert code is not None
        out_NK = torch.empty(len(logits_NE), k, dtype=torch.int64)
        threads = torch.get_num_threads() if logits_NE.numel() >= _MANY else 1
        code.mythos_greatest(out_NK.data_ptr(), logits_NE.data_ptr(), bias_E.data_ptr(), len(logits_NE), E, k, threads)
        return out_NK.view(*logits.shape[:-1], k)
    return (logits + bias_E).topk(k, dim=-1).indices


def expert_counts(experts_NK: Tensor, n_experts: int) -> Tensor:
    """How many of the choices fall on each expert: (E,) int64."""
    counts_E = torch.zeros(n_experts, dtype=torch.int64, device=experts_NK.device)
    return counts_E.scatter_add(0, experts_NK.flatten(), torch.ones_like(experts_NK.flatten()))


@dataclass
class Rows:
    """Which token stands in which row, rows of one expert side by side.

    There are two layouts. *Grouped* has as many rows as there are choices, for products of groups of any size.
    *Batched* gives every expert C rows, idle ones at the end where it has fewer tokens, for one batched product; the
    rest of the more popular experts' rows follows. Of PyTorch's products, on a CPU, those are several times as fast
    where experts have few tokens.

    Attributes:
        token_P: token of each row; N, behind the last, at idle ones.
        place_NK: row of each choice.
        n_experts: E.
        ends_E: int32, where each expert's rows end; None if batched.
        width: C; 0 if grouped.
        rest: expert, first row and end of those that have more than C.
        half: of grouped products, as :func:`open_mythos.ops.product.arithmetic` says.
    """

    token_P: Tensor
    place_NK: Tensor
    n_experts: int
    ends_E: Tensor | None = None
    width: int = 0
    rest: list[tuple[int, int, int]] = field(default_factory=list)
    half: bool = False

    @staticmethod
    def of(experts_NK: Tensor, n_experts: int, may_batch: bool = True, half: bool = False) -> Rows:
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
        return Rows(token_P, place_NK, n_experts, None if width else ends_E.to(torch.int32), width, rest, half)

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
            return grouped_product(x_PI, weight_EIO, self.ends_E, self.half)
        out_PO = x_PI.new_empty(len(x_PI), weight_EIO.shape[2])
        torch.bmm(self._batched(x_PI), weight_EIO, out=self._batched(out_PO))
        for expert, start, end in self.rest:
            torch.mm(x_PI[start:end], weight_EIO[expert], out=out_PO[start:end])
        return out_PO

    def outer(self, x_PI: Tensor, y_PO: Tensor) -> Tensor:
        """For every expert the sum over its rows of ``x y^T``: (E, I, O)."""
        if self.ends_E is not None:
            return grouped_outer(x_PI, y_PO, self.ends_E, half=self.half)
        out_EIO = torch.bmm(self._batched(x_PI).transpose(1, 2), self._batched(y_PO))
        for expert, start, end in self.rest:
            add_product(out_EIO[expert], x_PI[start:end].t(), y_PO[start:end])
        return out_EIO

    def add_outer(self, x_PI: Tensor, y_PO: Tensor, into: OneGradient) -> None:
        """:meth:`outer`, as another share of a gradient."""
        if self.ends_E is not None:
            into.add_grouped_outer(x_PI, y_PO, self.ends_E, self.half)
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
