"""The unrolled baseline: each loop has a block with weights of its own."""

from dataclasses import replace
from typing import cast

from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.context import Context
from open_mythos.nn.block import CoreBlocks, TransformerBlock
from open_mythos.nn.halting import ACTHalting
from open_mythos.nn.injection import LoRAAdapter, LTIInjection
from open_mythos.nn.recurrent import LoopBlock, LoopInput, Loops, step_slot


class PlainBlock(nn.Module):
    """A loop's part of a plain pre-norm transformer: ``cfg.core_layers`` blocks, and nothing else.

    Args:
        cfg: as of :class:`UntiedBlocks`. Output projections are initialised for the number of all blocks, as in GPT-2.
    """

    injection = lora = None

    def __init__(self, cfg: MythosConfig) -> None:
        super().__init__()
        deep, n = replace(cfg, core_layers=cfg.core_layers * cfg.max_loop_iters), cfg.core_layers
        self.block = TransformerBlock(deep, use_moe=True) if n == 1 else CoreBlocks(deep, n)

    @property
    def layers(self) -> list[TransformerBlock]:
        return [module for module in self.block.modules() if isinstance(module, TransformerBlock)]

    def step(self, h: Tensor, e: LoopInput | Tensor, loop: int | Tensor, ctx: Context) -> Tensor:
        """As :meth:`LoopBlock.step`; ``e`` is not read."""
        return cast(Tensor, self.block(h, ctx, cache_key=step_slot(loop, ctx)))


class UntiedBlocks(Loops):
    """A recurrent block whose every loop has weights of its own: a deep transformer, to compare loops with.

    Args:
        cfg: ``max_loop_iters`` is the number of blocks, and the most loops that can be run.
        made: the class of each loop's block.
    """

    def __init__(self, cfg: MythosConfig, made: type[LoopBlock] | type[PlainBlock] = LoopBlock) -> None:
        super().__init__()
        self.cfg = cfg
        self.blocks = nn.ModuleList(made(cfg) for _ in range(cfg.max_loop_iters))
        self.act = ACTHalting(cfg.dim, cfg.weight_std)

    @property
    def first(self) -> LoopBlock:
        return cast(LoopBlock, self.blocks[0])

    @property
    def block(self) -> nn.Module:
        """The first loop's transformer block."""
        return self.first.block

    @property
    def layers(self) -> list[TransformerBlock]:
        return [layer for block in self.blocks for layer in cast(LoopBlock, block).layers]

    @property
    def lora(self) -> LoRAAdapter | None:
        return self.first.lora

    @property
    def injection(self) -> LTIInjection | None:
        return self.first.injection

    def prepare(self, e: Tensor) -> LoopInput:
        return LoopInput(e)

    def step(self, h: Tensor, e: LoopInput | Tensor, loop: int | Tensor, ctx: Context) -> Tensor:
        if isinstance(loop, Tensor):
            raise ValueError(
                "this baseline has a separate block for each loop, so rows at different loops cannot run in one batch"
            )
        if loop >= len(self.blocks):
            raise ValueError(
                f"n_loops={loop + 1}, but this baseline has {len(self.blocks)} blocks and cannot go deeper"
            )
        return cast(LoopBlock, self.blocks[loop]).step(h, e.e if isinstance(e, LoopInput) else e, loop, ctx)
