"""Optimizers, parameter groups, learning-rate schedules and EMA."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from open_mythos.nn.block import TransformerBlock
from open_mythos.training.config import OptimConfig

if TYPE_CHECKING:
    from open_mythos.training.checkpoints import Part, Stored
    from open_mythos.training.parallel.pieces import Piece

# Router, halting gate, convolution taps, LoRA scales. Vectors (norms, the injection's A and B) do not decay either.
NO_DECAY = frozenset({"router", "act", "taps", "scale"})


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies to the parameter of this dotted name."""
    return parameter.ndim >= 2 and NO_DECAY.isdisjoint(name.split("."))


class Optimizer:
    """AdamW for every parameter, or Muon for the blocks' matrices and AdamW for the rest.

    Muon's updates are scaled to the RMS of AdamW's (``match_rms_adamw``: about ``0.2 lr`` for any shape, 2502.16982).
    Every :class:`~open_mythos.nn.linear.Linear` stores its weights at one scale, so that is the same relative change
    at any width. Muon takes 2-D weights that decay; experts (3-D), the tied embedding and :data:`NO_DECAY` stay with
    AdamW.
    """

    def __init__(self, model: nn.Module, cfg: OptimConfig, pieces: Mapping[str, Piece] | None = None) -> None:
        blocks = [(path, block) for path, block in model.named_modules() if isinstance(block, TransformerBlock)]
        inside = {f"{path}.{name}" for path, block in blocks for name, _ in block.named_parameters()}
        self.pieces = pieces or {}
        held = dict(model.named_parameters()) | {name: piece.held for name, piece in self.pieces.items()}
        is_muon = cfg.optimizer == "muon"
        matrices = {n: p for n, p in held.items() if is_muon and n in inside and p.ndim == 2 and decays(n, p)}
        rest = {name: p for name, p in held.items() if name not in matrices}
        groups = [
            {"params": [p for name, p in rest.items() if decays(name, p)], "weight_decay": cfg.weight_decay},
            {"params": [p for name, p in rest.items() if not decays(name, p)], "weight_decay": 0.0},
        ]
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in rest.values())
        adamw = torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=fused)
        self.parts: list[torch.optim.Optimizer] = [adamw]
        if matrices:
            options: dict[str, Any] = {"lr": cfg.muon_lr, "weight_decay": cfg.weight_decay}
            options["adjust_lr_fn"] = "match_rms_adamw"
            if any(name in self.pieces and self.pieces[name].mesh is not None for name in matrices):
                from open_mythos.training.parallel.muon import PiecewiseMuon

                self.parts.append(PiecewiseMuon([self.pieces[name] for name in matrices], **options))
            else:
                self.parts.append(torch.optim.Muon(matrices.values(), **options))
        named = {p: name for name, p in held.items()}
        self.names = [[named[p] for group in part.param_groups for p in group["params"]] for part in self.parts]
        for group in self._groups():
            group["full_lr"] = group["lr"]

    def scale_lr(self, factor: float) -> None:
        """Set every learning rate to ``factor`` of the configured one."""
        for group in self._groups():
            group["lr"] = factor * group["full_lr"]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """States of the optimizers, with divided tensors as :meth:`Piece.shared` returns them."""

        def shared(tensor: Tensor, piece: Piece | None) -> Tensor | Part:
            return piece.shared(tensor) if piece else tensor

        return {"parts": [self._mapped(i, part.state_dict(), shared) for i, part in enumerate(self.parts)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        def held(whole: Tensor | Stored, piece: Piece | None) -> Tensor:
            return piece.part(whole) if piece else whole[()]

        for i, (part, saved) in enumerate(zip(self.parts, state["parts"], strict=True)):
            part.load_state_dict(self._mapped(i, saved, held))

    def _mapped(self, i: int, state: dict[str, Any], way: Callable[[Any, Piece | None], Any]) -> dict[str, Any]:
        """The state of optimizer ``i`` with ``way`` applied to its tensors, except scalars such as step counts."""

        def mapped(index: int, value: Any) -> Any:
            return way(value, self.pieces.get(self.names[i][index])) if getattr(value, "ndim", 0) else value

        moved = {index: {k: mapped(index, v) for k, v in own.items()} for index, own in state["state"].items()}
        return state | {"state": moved}

    def _groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]


def lr_factor(cfg: OptimConfig, step: int, steps: int) -> float:
    """Learning-rate multiplier at ``step`` (from 0) of ``steps``.

    Linear warm-up over ``cfg.warmup`` steps, then constant with a linear decay over the last ``cfg.decay`` of the run
    ("wsd": warm-up, stable, decay; 2404.06395), or a cosine decay. Both end at ``cfg.floor``.
    """
    step = min(step, steps)  # trial steps (``cost.py``) may run past the end
    if step < cfg.warmup:
        return (step + 1) / cfg.warmup
    if cfg.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * (step - cfg.warmup) / max(1, steps - cfg.warmup)))
    else:
        factor = min(1.0, (steps - step) / (cfg.decay * steps)) if cfg.decay else 1.0
    return cfg.floor + (1 - cfg.floor) * factor


class EMA:
    """Exponential moving average of a model's parameters, or of their pieces: the weights that a run saves.

    The decay of the n-th update (from 0) is ``min(decay, (n + 1) / (n + 10))``, so that the initial weights are
    forgotten quickly; with ``decay`` 0 the average equals the parameters. For frozen parameters it shares their memory.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.updates = 0
        self.trained = [name for name, p in parameters.items() if p.requires_grad]
        self.average = {name: p.detach() for name, p in parameters.items()}
        self.average |= {name: self.average[name].clone() for name in self.trained}

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (self.updates + 1) / (self.updates + 10))
        moved, towards = ([of[name] for name in self.trained] for of in (self.average, self.parameters))
        torch._foreach_lerp_(moved, towards, 1 - decay)
        self.updates += 1
