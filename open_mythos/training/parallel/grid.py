"""The layout of a run's processes: which hold the same weights, which divide them, and which rows each runs."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from open_mythos import __version__
from open_mythos.fields import must
from open_mythos.training import distributed
from open_mythos.training.config import TrainConfig


class Grid:
    """The device meshes: ``replicate`` x ``shard`` x ``tensor`` processes, and the same ones as a mesh for experts.

    Ranks are assigned so that neighbours, which are on one machine, divide a layer (``tensor``), then the experts
    (``expert``), then the weights (``shard``); ``replicate`` extends over machines. Processes of a ``tensor`` group run
    the same rows; all others run rows of their own.

    Attributes:
        replicate, shard, expert, tensor: sizes.
        slices: number of parts that FSDP divides each expert's weights into, if ``expert`` is less than ``shard``.
        n_data, data: number of processes with rows of their own, and the index of this one among them.
        dense, sparse: meshes ``(replicate, shard, tensor)`` and, for experts, ``(copies, slices, expert, tensor)``;
            None for a single process, and ``sparse`` if experts are not divided.

    Raises:
        ValueError: for sizes whose product is not the number of processes, or a batch that does not divide among them.
    """

    def __init__(self, run: TrainConfig) -> None:
        n, cfg = distributed.world_size(), run.parallel
        self.shard, self.expert, self.tensor = cfg.shard, cfg.expert, cfg.tensor
        parts = f"parallel.shard={cfg.shard} x parallel.tensor={cfg.tensor}"
        one = cfg.shard * cfg.tensor
        must(n % one == 0, f"{n} processes are not a multiple of {parts}; start a multiple of {one}, or lower either")
        self.replicate = cfg.replicate or n // one
        said = f"parallel.replicate={self.replicate} x {parts} are {self.replicate * one} processes"
        must(self.replicate * one == n, f"{said}, but there are {n}; use parallel.replicate={n // one}")
        self.n_data, self.data = self.replicate * self.shard, distributed.rank() // self.tensor
        low, high = sorted((self.expert, self.shard))
        said = f"parallel.expert={self.expert} does not fit {self.n_data} processes with parallel.shard={self.shard}"
        must(self.n_data % self.expert == 0 and high % low == 0, f"{said}; use a divisor of both")
        shares = run.accumulate * self.n_data
        said = f"batch_size={run.batch_size} with accumulate={run.accumulate} cannot be split among {self.n_data}"
        must(run.batch_size % shares == 0, f"{said} processes; use a multiple of {shares}")
        self.slices = max(1, self.shard // self.expert)
        self.dense: DeviceMesh | None = None
        self.sparse: DeviceMesh | None = None

    def connect(self, device: torch.device, timeout: float) -> None:
        """Create the process groups; from now on a collective fails after waiting ``timeout`` seconds for others."""
        if distributed.world_size() == 1 or not dist.is_initialized():
            return
        versions = distributed.gathered(f"{torch.__version__} and open_mythos {__version__}")
        other = next((i for i, version in enumerate(versions) if version != versions[0]), 0)
        said = (
            f"process {other} has torch {versions[other]} and process 0 {versions[0]}; install one version everywhere"
        )
        must(not other, said)
        names, shape = ("replicate", "shard", "tensor"), (self.replicate, self.shard, self.tensor)
        self.dense = init_device_mesh(device.type, shape, mesh_dim_names=names)
        groups = [None, *self.dense.get_all_groups()]
        if self.expert > 1:
            of_experts = self.n_data // self.slices // self.expert, self.slices, self.expert, self.tensor
            names_of_experts = "copies", "slices", "expert", "tensor"
            self.sparse = init_device_mesh(device.type, of_experts, mesh_dim_names=names_of_experts)
            groups += self.sparse.get_all_groups()
        for group in groups:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), group)

    def group(self, name: str) -> dist.ProcessGroup | None:
        """The process group of this process along the dimension ``name``; None if it would be alone in it."""
        mesh = self.dense if self.dense is not None and name in (self.dense.mesh_dim_names or ()) else self.sparse
        return None if mesh is None or mesh[name].size() == 1 else mesh.get_group(name)

    def share(self, n: int) -> slice:
        """The rows of a step's ``n`` that this process runs."""
        share = n // self.n_data
        return slice(share * self.data, share * (self.data + 1))

    def beside(self, rows: slice, n: int) -> torch.Tensor:
        """Rows of a step's ``n`` that the processes of this ``expert`` group run while this one runs ``rows``."""
        share, first = n // self.n_data, -(self.data % self.expert)
        return torch.cat([torch.arange(rows.start, rows.stop) + (first + i) * share for i in range(self.expert)])
