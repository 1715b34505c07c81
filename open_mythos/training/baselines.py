"""What a looped model has to be compared with: models without a loop, of as many parameters or as much arithmetic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.model import OpenMythos
from open_mythos.nn.block import CoreBlocks, TransformerBlock
from open_mythos.nn.halting import ACTHalting
from open_mythos.nn.lora import LoRAAdapter
from open_mythos.nn.recurrent import RecurrentBlock
from open_mythos.training.config import TrainConfig


class UntiedBlocks(RecurrentBlock):
    """A recurrent block whose every loop has weights of its own: a plain deep transformer of the same arithmetic.

    Args:
        cfg: ``max_loop_iters`` is the number of blocks, and the one number of loops that there is.
    """

    def __init__(self, cfg: MythosConfig) -> None:
        nn.Module.__init__(self)
        self.cfg = cfg
        self.blocks = nn.ModuleList(RecurrentBlock(cfg) for _ in range(cfg.max_loop_iters))
        self.act = ACTHalting(cfg.dim, cfg.weight_std)
        for block in self.blocks:
            del block.act  # one is enough, and it is never asked

    @property
    def block(self) -> TransformerBlock | CoreBlocks:  # type: ignore[override]
        """The first loop's block."""
        return cast(RecurrentBlock, self.blocks[0]).block

    @property
    def lora(self) -> LoRAAdapter | None:  # type: ignore[override]
        """The first loop's adapter."""
        return cast(RecurrentBlock, self.blocks[0]).lora

    def step(self, h: Tensor, e: Tensor, loop: int | Tensor, *inputs: Any) -> Tensor:
        if isinstance(loop, Tensor):
            raise ValueError("this baseline has a block for each loop, so rows at different loops do not run together")
        if loop >= len(self.blocks):
            raise ValueError(
                f"n_loops={loop + 1}, but this baseline has {len(self.blocks)} blocks and cannot go deeper"
            )
        return cast(RecurrentBlock, self.blocks[loop]).step(h, e, loop, *inputs)


class UnrolledMythos(OpenMythos):
    """:class:`OpenMythos` with :class:`UntiedBlocks`: as deep as ``cfg.max_loop_iters`` loops, and never deeper."""

    def __init__(self, cfg: MythosConfig) -> None:
        super().__init__(replace(cfg, recurrence="injected", halting=False, warm_start=False))
        self.recurrent = UntiedBlocks(self.cfg)


def build(cfg: TrainConfig) -> OpenMythos:
    """The model that a run trains: :class:`OpenMythos`, or one of the baselines if ``cfg.kind`` says so.

    A looped model is built as it is trained here, by the run's own loop counts: its gate comes afterwards, and it
    explores no depths by itself.
    """
    model_cfg = replace(cfg.model, halting=False, warm_start=False)
    if cfg.kind == "single":
        return OpenMythos(replace(model_cfg, max_loop_iters=1))
    if cfg.kind == "unrolled":
        return UnrolledMythos(replace(model_cfg, max_loop_iters=cfg.loops.maximum))
    return OpenMythos(model_cfg)


def model_class(cfg: TrainConfig) -> type[OpenMythos]:
    """The class whose ``from_pretrained`` reads what such a run saves."""
    return UnrolledMythos if cfg.kind == "unrolled" else OpenMythos
