"""Expert and tensor parallelism, beside FSDP: divides routed experts, dense feed-forwards and the vocabulary."""

from typing import Any

import torch
from torch import nn

from open_mythos.fields import must
from open_mythos.model import OpenMythos
from open_mythos.nn.feed_forward import Expert, MoEFFN
from open_mythos.training.parallel.experts import Dispatch
from open_mythos.training.parallel.grid import Grid
from open_mythos.training.parallel.pieces import Cuts
from open_mythos.training.parallel.tensor import Vocabulary, add_parts


def divide(model: OpenMythos, grid: Grid) -> Cuts:
    """Reduce ``model`` in place to the part of this process; returns which axes of which parameters were divided.

    Raises:
        ValueError: for sizes that do not divide evenly.
    """
    cuts: Cuts = {}
    group = grid.group("expert")
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, MoEFFN)]
    dispatch = None if group is None else Dispatch(group)
    for path, ffn in layers if dispatch is not None else ():
        assert group is not None and dispatch is not None
        n, size, width = ffn.n_experts, grid.expert, ffn.down.shape[2]
        must(n % size == 0, f"parallel.expert={size} does not divide model.n_experts={n}; use a divisor of it")
        both, dim = grid.slices, ffn.down.shape[1]
        said = f"parallel.shard={grid.shard} splits each expert into {both} parts, but model.expert_dim={width}"
        must((2 * width) % both == 0 and dim % both == 0, f"{said} and model.dim={dim} do not allow that; lower it")
        for name in ("gate_up", "down"):
            _keep(ffn, name, 0, torch.distributed.get_rank(group), size)
            cuts[f"{path}.{name}"] = {"expert": 0}
        ffn.engine = dispatch
    must(group is None or bool(layers), f"parallel.expert={grid.expert}, but the model has no routed experts; use 1")
    group = grid.group("tensor")
    for path, module in model.named_modules() if group is not None else ():
        if isinstance(module, Expert):
            assert group is not None
            dim, width = module.gate.weight.shape[1], module.gate.weight.shape[0]
            said = f"parallel.tensor={grid.tensor} and parallel.shard={grid.shard} do not divide a feed-forward of"
            fits = width % grid.tensor == 0 and dim % grid.shard == 0
            must(fits, f"{said} {width} hidden units and model.dim={dim} ({path}); use divisors of these")
            for name, axis in (("gate", 0), ("up", 0), ("down", 1)):
                _keep(getattr(module, name), "weight", axis, torch.distributed.get_rank(group), grid.tensor)
                cuts[f"{path}.{name}.weight"] = {"tensor": axis}
            add_parts(module, group)
    embed, head = model.embed, model.head
    if group is not None and embed.num_embeddings % grid.tensor == 0 and embed.embedding_dim % grid.shard == 0:
        is_tied = head.weight is embed.weight
        for module in (embed, head):
            _keep(module, "weight", 0, torch.distributed.get_rank(group), grid.tensor)
        head.weight = embed.weight if is_tied else head.weight
        cuts |= {name: {"tensor": 0} for name in ("embed.weight", "head.weight")}
        Vocabulary(embed, head, group)
    return cuts


def _keep(module: nn.Module, name: str, dim: int, i: int, n: int) -> None:
    """Replace a parameter by the ``i``-th of its ``n`` parts along ``dim``."""
    whole: Any = getattr(module, name)
    with torch.no_grad():
        part = nn.Parameter(whole.chunk(n, dim)[i].contiguous().clone(), requires_grad=whole.requires_grad)
    setattr(module, name, part)
