"""The recurrence of the public reference: the output is a mean of all loops' states, weighted by a halting gate."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.context import Context
from open_mythos.nn.exits import LoopState
from open_mythos.nn.injection import LTIInjection
from open_mythos.nn.linear import WEIGHT_STD
from open_mythos.nn.recurrent import LoopInput, RecurrentBlock, step_slot


class MixtureGate(nn.Module):
    """``sigmoid(w h + b)``, the weight of a state in the mixture.

    Args:
        dim: width of h.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.halt = nn.Linear(dim, 1)
        nn.init.normal_(self.halt.weight, std=WEIGHT_STD)
        nn.init.zeros_(self.halt.bias)

    def forward(self, state: Tensor) -> Tensor:
        """(B, T, dim), or the wider states of :class:`MixtureBlock`, whose first dim channels are h, to (B, T)."""
        return self.halt(state[..., : self.halt.in_features].to(self.halt.weight.dtype)).squeeze(-1).sigmoid()


class MixtureBlock(RecurrentBlock):
    """``h <- A h + B e + Transformer(norm(h + e))``; the coda reads a mean of all h (Graves 2016, arXiv:1603.08983).

    ``Transformer`` includes its residual stream, and LoRA reads and adapts its output. The gate's value weights each h,
    until the weights add up to ``cfg.act_threshold``: the h that reaches it gets the rest of 1, later ones 0. If the
    loops end before, the sum is less than 1. All of it is differentiable, so the gate needs no loss of its own.

    With ``cfg.halting`` a position stops, in eval mode, when its mixture is complete. Others then go on reading its
    last keys and values, which changes the result slightly; without it, every position runs every loop.

    The state passed between loops is (B, T, 2 dim + 1), float32 or wider: h, the mixture so far, and the weight spent.
    A may be anywhere in [0, 1], the ends included.

    Args:
        cfg: the model's config.
    """

    def __init__(self, cfg: MythosConfig) -> None:
        super().__init__(cfg)
        self.injection = LTIInjection(cfg.dim, cfg.injection_decay, cfg.injection_gain, margin=0.0)
        self.act = MixtureGate(cfg.dim)  # type: ignore[assignment]

    def begin(self, h: Tensor) -> Tensor:
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        return torch.cat([wide, torch.zeros_like(wide), torch.zeros_like(wide[..., :1])], -1)

    def output(self, state: Tensor) -> Tensor:
        dim = self.cfg.dim
        return state[..., dim : 2 * dim].to(self.injection.B.dtype)

    def iterate(self, h: Tensor, *inputs: Any, **options: Any) -> Iterator[LoopState]:
        """As :meth:`RecurrentBlock.iterate`, from a state or from a first h, (B, T, dim)."""
        return super().iterate(self.begin(h) if h.shape[-1] == self.cfg.dim else h, *inputs, **options)

    def prepare(self, e: Tensor) -> LoopInput:
        return LoopInput(e)

    def step(self, h: Tensor, e: LoopInput | Tensor, loop: int | Tensor, ctx: Context) -> Tensor:
        e = e.e if isinstance(e, LoopInput) else e
        h, mixed, spent = h.split([self.cfg.dim, self.cfg.dim, 1], -1)
        h = h.to(e.dtype)
        x = self.norm(self._with_loop_index(h, loop, ctx) + e)
        x = self.block(x, ctx, cache_key=step_slot(loop, ctx))
        if self.lora is not None:
            x = x + self.lora(x, loop)
        h = self.injection(h, e, x).to(mixed.dtype)
        share = self.act(h).unsqueeze(-1).to(mixed.dtype)
        rest = (1 - spent).clamp(min=0)
        unspent = spent < self.cfg.act_threshold
        weight = torch.where(spent + share >= self.cfg.act_threshold, rest, share) * unspent
        return torch.cat([h, mixed + weight * h, spent + share * unspent], -1)
