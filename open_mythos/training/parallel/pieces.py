"""The pieces (shards) of parameters that one process holds, and their place in the whole."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from open_mythos.training import distributed
from open_mythos.training.checkpoints import Part, Stored
from open_mythos.training.parallel.grid import Grid

Cuts = dict[str, dict[str, int]]
"""By parameter name: the axis along which each dimension of the grid divides it, beside FSDP."""


@dataclass(frozen=True, eq=False)
class Piece:
    """The shard of one parameter that this process holds.

    Attributes:
        parameter: as the model has it; FSDP makes it a ``DTensor``.
        held: the same memory as a plain tensor, used by optimizer and average.
        shape: of the whole.
        mesh, placements: how the whole is divided; None and empty where every process holds all of it.
        copies: number of processes that hold the same shard.
        is_first: whether this process is the first of these.
        group: processes whose gradients have to be summed, where FSDP does not do it.
    """

    parameter: nn.Parameter
    held: nn.Parameter
    shape: torch.Size
    mesh: DeviceMesh | None = None
    placements: tuple[Shard, ...] = ()
    copies: int = 1
    is_first: bool = True
    group: dist.ProcessGroup | None = None

    @property
    def place(self) -> tuple[slice, ...]:
        """Its slice of the whole on each axis; axes are divided as by :func:`torch.chunk`."""
        ranges = [range(n) for n in self.shape]
        for i, placement in enumerate(self.placements):
            assert self.mesh is not None
            whole, n, own = ranges[placement.dim], self.mesh.size(i), self.mesh.get_local_rank(i)
            size = -(-len(whole) // n)
            ranges[placement.dim] = whole[own * size : (own + 1) * size]
        return tuple(slice(r.start, r.stop) for r in ranges)

    def shared(self, held: Tensor) -> Part:
        """This process's part of a tensor that is divided as the parameter is, for a checkpoint."""
        start = tuple(part.start for part in self.place)
        return Part(held.detach(), tuple(self.shape), start, self.is_first)

    def as_dtensor(self, held: Tensor) -> DTensor | Tensor:
        """Wrap a shard as a ``DTensor`` divided as the parameter is; undivided ones are returned as they are."""
        if self.mesh is None:
            return held
        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(
            held, self.mesh, self.placements, run_check=False, shape=self.shape, stride=stride
        )  # fmt: skip

    @torch.no_grad()
    def whole(self, held: Tensor) -> Tensor:
        """The whole of a tensor that is divided as the parameter is; to be called by all processes that hold a part."""
        found = self.as_dtensor(held)
        return found.full_tensor() if isinstance(found, DTensor) else found

    def gathered(self, held: Tensor) -> Tensor:
        """As :meth:`whole`, but a tensor that had to be gathered is on the first process's CPU, and empty elsewhere."""
        if self.mesh is None:
            return held.detach()
        whole = self.whole(held.detach())
        return whole.cpu() if distributed.rank() == 0 else whole.new_empty(0)

    def part(self, whole: Tensor | Stored) -> Tensor:
        """The shard of ``whole`` that this process holds, copied if it is divided; every process has or reads it."""
        return whole[()] if self.mesh is None else whole[self.place].to(self.held.device, copy=True)

    @torch.no_grad()
    def follow(self) -> None:
        """After a backward pass, point ``held`` to its gradient, and to the memory where FSDP now has the weights."""
        if isinstance(self.parameter, DTensor):
            gradient = self.parameter.grad
            self.held.data = self.parameter.to_local()
            self.held.grad = gradient.to_local() if isinstance(gradient, DTensor) else gradient


def pieces(model: nn.Module, grid: Grid, cuts: Cuts) -> dict[str, Piece]:
    """The pieces that this process holds of a divided model's parameters, by name."""
    return {name: _piece(parameter, grid, cuts.get(name, {})) for name, parameter in model.named_parameters()}


def _piece(parameter: nn.Parameter, grid: Grid, cut: Mapping[str, int]) -> Piece:
    is_expert, by_fsdp = "expert" in cut, isinstance(parameter, DTensor)
    mesh = grid.sparse if is_expert else grid.dense
    if mesh is None:
        return Piece(parameter, parameter, parameter.shape)
    dims, held = dict(cut), parameter
    if isinstance(parameter, DTensor):
        with torch.no_grad():
            held = nn.Parameter(parameter.to_local(), requires_grad=parameter.requires_grad)
        by = next(placement for placement in parameter.placements if isinstance(placement, Shard))
        dims["slices" if is_expert else "shard"] = by.dim
    names = [name for name in mesh.mesh_dim_names or () if name in dims and mesh[name].size() > 1]
    shape = list(parameter.shape)
    for name, dim in cut.items():
        shape[dim] *= mesh[name].size()
    copies = distributed.world_size() // prod(mesh[name].size() for name in names)
    group = None if by_fsdp else grid.group("copies" if is_expert else "replicate")
    own, placements = (mesh[tuple(names)], tuple(Shard(dims[name]) for name in names)) if names else (None, ())
    is_first = all(mesh[name].get_local_rank() == 0 for name in mesh.mesh_dim_names or () if name not in names)
    return Piece(parameter, held, torch.Size(shape), own, placements, copies, is_first, group)
