"""Expert parallelism: tokens are sent to the processes that hold their experts, and the outputs are sent back.

Shape letters as in :mod:`open_mythos.ops.experts`; also S processes, Q rows sent to them, R rows received from them,
and C numbers of a row: the token's channels, its routing weights, and its experts' indices.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from open_mythos.ops.dispatch import compute_dtype
from open_mythos.ops.experts import swiglu_sorted

_SPENT = 2  # up to so many times the (token, expert) pairs, rows are sent to all rather than counted beforehand
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def goes_everywhere(n_processes: int, topk: int) -> bool:
    """Whether every token is sent to all processes, whose counts are then known: more bytes, but one exchange less."""
    return n_processes <= _SPENT * topk


class Dispatch:
    """Replacement of :func:`~open_mythos.ops.experts.swiglu_experts` with this process's part of the experts' weights.

    Each call exchanges rows and results, and between many processes first the numbers of rows. It is a collective: all
    processes of the group have to call it, even without tokens of their own, and equally often forward and backward.
    A token is sent once to a process, however many of its experts are there, and their outputs are summed there.

    Args:
        group: the processes; the first has the first experts, and so on.

    Attributes:
        tokens: number of tokens of each process in the next call; None if all have as many as this one.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        self.tokens: list[int] | None = None

    def meet(self, running: Tensor, length: int) -> None:
        """Set :attr:`tokens` from which rows run the next loop, (n,) on the CPU by process, of ``length`` tokens."""
        self.tokens = (running.view(self.size, -1).sum(1) * length).tolist()

    @torch.compiler.disable
    def __call__(
        self, x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, experts_NK: Tensor, weights_NK: Tensor,
        scales: tuple[float, float], to_ND: Tensor | None,
    ) -> Tensor:  # fmt: skip
        (N, D), K, S, E, dtype = x_ND.shape, experts_NK.shape[1], self.size, len(down_EDF), compute_dtype(x_ND)
        chosen_NS = experts_NK.new_zeros(N, S).scatter_add_(1, experts_NK // E, torch.ones_like(experts_NK))
        ids_NK = experts_NK.to(_INTEGERS[dtype.itemsize]).view(dtype)
        sent_NC = torch.cat([x_ND.to(dtype), (weights_NK * scales[1]).to(dtype), ids_NK], 1)
        found_RC, there_S = None, (chosen_NS > 0).sum(0)
        if goes_everywhere(S, K):
            each = self.tokens or [N] * S
            assert each[self.rank] == N
            all_RC = self._exchange(sent_NC.detach().repeat(S, 1), [N] * S, each)
            is_here_RK = _experts(all_RC[:, D + K :]) // E == self.rank
            is_here_R = is_here_RK.any(1)
            here_S, come_S = (torch.stack([one.sum() for one in x.split(each)]) for x in (is_here_R, is_here_RK))
        else:
            numbers_S2 = torch.stack([there_S, chosen_NS.sum(0)], 1)
            here_S, come_S = self._exchange(numbers_S2, [1] * S, [1] * S).unbind(1)
        there, here, come = torch.stack([there_S, here_S, come_S]).tolist()  # the only GPU synchronisation
        if goes_everywhere(S, K):
            found_RC = all_RC[_first(is_here_R, sum(here))]
        token_Q = _first((chosen_NS.t() > 0).flatten(), sum(there)) % max(1, N)
        rows_RC = _Exchanged.apply(sent_NC.index_select(0, token_Q), there, here, self._exchange, found_RC)
        rows_RD, weights_RK, ids_RK = rows_RC.split([D, K, K], 1)
        expert_P = _experts(ids_RK.detach()).flatten() - self.rank * E
        expert_P = expert_P.where((expert_P >= 0) & (expert_P < E), E)  # those of other processes to the end
        ends_E = torch.zeros(E + 1, dtype=torch.int64, device=x_ND.device)
        ends_E = ends_E.scatter_add_(0, expert_P, torch.ones_like(expert_P))[:E].cumsum(0).to(torch.int32)
        order_P = expert_P.argsort(stable=True)[: sum(come)]
        out_RD = swiglu_sorted(rows_RD, gate_up_E2FD, down_EDF, order_P, ends_E, weights_RK, (scales[0], 1.0))
        out_QD = _Exchanged.apply(out_RD, here, there, self._exchange)
        to_ND = torch.zeros_like(x_ND, dtype=dtype) if to_ND is None else to_ND
        return to_ND.index_add(0, token_Q, out_QD.to(to_ND.dtype))

    def _exchange(self, x: Tensor, there: list[int], here: list[int]) -> Tensor:
        """Exchange rows all-to-all: send ``there[i]`` rows to process i, and receive ``here[i]`` from it."""
        found = x.new_empty(sum(here), x.shape[1])
        dist.all_to_all_single(found, x.contiguous(), here, there, self.group)
        return found


def _experts(ids_RK: Tensor) -> Tensor:
    """Indices of experts, which were sent as the bits of floating-point numbers."""
    return ids_RK.contiguous().view(_INTEGERS[ids_RK.dtype.itemsize]).long()


def _first(is_true: Tensor, n: int) -> Tensor:
    """Indices of the ``n`` true elements, without the GPU synchronisation of ``nonzero``, which has to count them."""
    return is_true.byte().argsort(descending=True, stable=True)[:n]


class _Exchanged(torch.autograd.Function):
    """``exchange(x, there, here)``, or ``found`` if already exchanged; the gradient is exchanged in reverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: list[int], here: list[int], exchange: Any, found: Any = None) -> Tensor:
        ctx.back = exchange, here, there
        return exchange(x, there, here) if found is None else found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        exchange, here, there = ctx.back
        return exchange(grad, here, there), None, None, None, None
