"""FSDP2 for a model whose blocks run many times a step: each unit is gathered once, and its gradient reduced once."""

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard

from open_mythos.nn.auxiliary import experts
from open_mythos.nn.block import TransformerBlock
from open_mythos.training.parallel.grid import Grid
from open_mythos.training.parallel.pieces import Cuts


def shard(step: nn.Module, model: nn.Module, grid: Grid, cuts: Cuts) -> list[Any]:
    """Divide ``model``, which ``step`` calls, with FSDP: its blocks are units, and the remaining parameters are one.

    A unit stays gathered from its first use to the end of the step, however often it is called or recomputed.

    With expert parallelism, all but the experts is one unit, gathered before the first loop and reduced after the last.
    Otherwise processes would deadlock: one whose rows are done waits for the others in the gather of the coda, while
    they still loop and wait for it in the exchange of tokens. Experts that FSDP divides as well are units on a mesh of
    their own.

    Returns:
        The units.
    """
    assert grid.dense is not None
    by_parameter = {parameter: cuts[name] for name, parameter in model.named_parameters() if name in cuts}

    def divided_along(parameter: nn.Parameter) -> Shard:
        taken = by_parameter.get(parameter, {}).values()
        return Shard(1 if 0 in taken else 0)  # the axis that is not divided yet

    mesh = grid.dense["replicate", "shard"] if grid.replicate > 1 else grid.dense["shard"]
    options: dict[str, Any] = {"reshard_after_forward": False, "shard_placement_fn": divided_along}
    units: list[Any] = []
    ignored = set[nn.Parameter]()
    for ffn in experts(model) if grid.expert > 1 else ():
        if grid.sparse is None or grid.slices == 1:  # each process has its own experts, whole
            ignored |= {ffn.gate_up, ffn.down}
            continue
        units += [fully_shard(part, mesh=mesh, **options) for part in (ffn.router, ffn.shared) if part is not None]
        has_copies = grid.sparse["copies"].size() > 1
        own = grid.sparse["copies", "slices"] if has_copies else grid.sparse["slices"]
        units.append(fully_shard(ffn, mesh=own, **options))
    blocks = [] if grid.expert > 1 else [module for module in model.modules() if isinstance(module, TransformerBlock)]
    units += [fully_shard(module, mesh=mesh, ignored_params=ignored, **options) for module in (*blocks, step)]
    for unit in units:
        assert isinstance(unit, FSDPModule)
        unit.set_reshard_after_backward(False, recurse=False)
        unit.set_gradient_divide_factor(1.0)  # losses are shares of one sum, so gradients are added up
        unit.set_force_sum_reduction_for_comms(True)
    return units
