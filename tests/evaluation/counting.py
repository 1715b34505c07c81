"""A task and a model made by hand, for which every metric is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from helpers import tiny_config
from torch import Tensor, nn

from open_mythos.context import Context
from open_mythos.nn.exits import Gate, LoopState
from open_mythos.nn.modes import is_evaluating
from open_mythos.ops.attention import AttentionMask
from open_mythos.tasks.base import Batch, Task


class Copy(Task):
    """Predict the input token, 1 or 2, at each position."""

    name, unit, vocab, chance = "copy", "tokens", ("<pad>", "a", "b"), 0.5

    def length(self, difficulty: int) -> int:
        return difficulty

    def batch(self, n: int, difficulty: int, generator: torch.Generator | None = None) -> Batch:
        self.check(difficulty)
        ids = torch.randint(1, 3, (n, difficulty), generator=generator)
        return Batch(ids, ids)


class Counting(nn.Module):
    """Its state at a position is (loops run, token, initial third number); position t is right from loop t + 1 on.

    From ``forgets`` loops on, all answers are wrong. They are also wrong where the third number is above 0: the model's
    own initial state and zeros give the same answers, and half of all noise gives wrong ones. With halting or any exit,
    a position stops as soon as it is right.
    """

    def __init__(self, forgets: int = 10**6) -> None:
        super().__init__()
        self.cfg = tiny_config(max_loop_iters=4, halting=False)
        self.forgets = forgets
        self.weight = nn.Parameter(torch.zeros(1))
        self.most_tokens = 0  # of all passes

    @property
    def recurrent(self) -> Counting:
        return self

    def choose_exit(self, exit: Any) -> Any:
        return exit or (Gate(self.cfg.act_threshold) if self.cfg.halting else None)

    def encode(self, ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Context]:
        assert is_evaluating() and not torch.is_grad_enabled()
        self.most_tokens = max(self.most_tokens, ids.numel())
        zeros = torch.zeros_like(ids)
        mask = AttentionMask(ids.shape[1], ids.shape[1], attention_mask)
        return torch.stack([zeros, ids, zeros], -1).float(), Context(torch.zeros(1), mask)

    def first_state(self, e: Tensor, ctx: Context) -> Tensor:
        return e

    def iterate(self, h: Tensor, e: Tensor, ctx: Context, n_loops: int, exit: Any, readout: Any) -> Iterator[LoopState]:
        live = torch.ones(h.shape[:2], dtype=torch.bool) if ctx.mask.valid is None else ctx.mask.valid
        h = torch.stack([torch.zeros_like(h[..., 0]), e[..., 1], h[..., 2]], -1)
        for loop in range(n_loops):
            halts = self.cfg.halting or exit is not None
            ran = live & (torch.arange(h.shape[1]) >= loop) if halts else live
            if not ran.any():
                return
            h = h + torch.tensor([1.0, 0.0, 0.0]) * ran.unsqueeze(-1)
            yield LoopState(loop, h, ran)

    def decode(self, h: Tensor, *context: Any) -> Tensor:
        return h

    def readout(self, *context: Any) -> Callable[[Tensor, int], Tensor]:
        return lambda h, loop: self.head(self.decode(h))

    def head(self, h: Tensor) -> Tensor:
        count, token, start = h.unbind(-1)
        right = (count > torch.arange(h.shape[1])) & (count < self.forgets) & (start <= 0)
        answer = torch.where(right, token, 3 - token).long().clamp(0, 2)
        return nn.functional.one_hot(answer, 3).float() * count.unsqueeze(-1)
