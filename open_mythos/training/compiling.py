"""Training through ``torch.compile``: the blocks become code, and Python goes on driving the loops."""

from __future__ import annotations

import torch._dynamo.config
from torch import nn

from open_mythos.nn.block import TransformerBlock
from open_mythos.training.config import TrainConfig

# A block is called in several ways, each with code of its own: with gradient and without, as prelude or core, and for
# one row or token, few, or many. Beyond the limit further ones would not be compiled.
_WAYS = 32


def compile_blocks(model: nn.Module, cfg: TrainConfig) -> None:
    """Have every transformer block of ``model`` compiled, in place, at its first call of each kind.

    A block knows nothing of the loop that calls it, so no number of loops compiles anything anew, and blocks of one
    shape share their code. Where rows or tokens differ from call to call, one code is made for all of their numbers
    from the start: a loop that is recomputed in the backward pass has to meet the code that it met before.

    Args:
        model: its parameters keep their names; copies of it are not compiled.
        cfg: reads ``loops.per`` and the task's difficulties.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _WAYS)
    is_varied = cfg.loops.per == "sequence" or cfg.task.min_difficulty < cfg.task.max_difficulty
    for module in model.modules():
        if isinstance(module, TransformerBlock):
            module.compile(dynamic=True if is_varied else None)
