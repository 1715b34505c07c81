"""The processes of a run as a grid: who has the same weights, who shares them, and who reads which rows."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from open_mythos import __version__
from open_mythos.fields import must
from open_mythos.training import distributed
from open_mythos.training.config import TrainConfig


class Grid:
    """``replicate`` x ``shard`` x ``tensor`` processes, seen as a second grid by the experts.

    Neighbours by number, which are those of one machine, share one layer (``tensor``), then one set of experts
    (``expert``), then one set of weights (``shard``); ``replicate`` goes over machines. Processes of a ``tensor`` group
    run the same rows, all others rows of their own.

    Attributes:
        replicate, shard, expert, tensor: sizes.
        slices: in how many parts the weights of an expert are divided, where fewer processes share the experts than
            share the rest.
        n_data, data: processes with rows of their own, and which of these this one is.
        dense, sparse: meshes ``(replicate, shard, tensor)`` and, for experts, ``(copies, slices, expert, tensor)``;
            None of one process, and of experts that are not divided.

    Raises:
        ValueError: for sizes that do not make up the number of processes, or a batch that they cannot share.
    """

    def __init__(self, run: TrainConfig) -> None:
        n, cfg = distributed.world_size(), run.parallel
        self.shard, self.expert, self.tensor = cfg.shard, cfg.expert, cfg.tensor
        parts = f"parallel.shard={cfg.shard} x parallel.tensor={cfg.tensor}"
        one = cfg.shard * cfg.tensor
        must(n % one == 0, f"{n} processes do not divide into {parts}; start a multiple of {one}, or lower one of them")
        self.replicate = cfg.replicate or n // one
        said = f"parallel.replicate={self.replicate} x {parts} are {self.replicate * one} processes"
        must(self.replicate * one == n, f"{said} and there are {n}; use parallel.replicate={n // one}")
        self.n_data, self.data = self.replicate * self.shard, distributed.rank() // self.tensor
        low, high = sorted((self.expert, self.shard))
        said = f"parallel.expert={self.expert} does not divide {self.n_data} processes, parallel.shard={self.shard}"
        must(self.n_data % self.expert == 0 and high % low == 0, f"{said} of them; use a divisor of both")
        shares = run.accumulate * self.n_data
        said = f"batch_size={run.batch_size} in accumulate={run.accumulate} parts does not divide among {self.n_data}"
        must(run.batch_size % shares == 0, f"{said} processes; use a multiple of {shares}")
        self.slices = max(1, self.shard // self.expert)
        self.dense: DeviceMesh | None = None
        self.sparse: DeviceMesh | None = None

    def connect(self, device: torch.device, timeout: float) -> None:
        """Make the groups; from now on a process that waits for others for ``timeout`` seconds fails."""
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
        """The processes that differ from this one in the dimension ``name`` alone; None if there are no others."""
        mesh = self.dense if self.dense is not None and name in (self.dense.mesh_dim_names or ()) else self.sparse
        return None if mesh is None or mesh[name].size() == 1 else mesh.get_group(name)

    def share(self, n: int) -> slice:
        """Which of the ``n`` rows of a step this process runs."""
        share = n // self.n_data
        return slice(share * self.data, share * (self.data + 1))

    def beside(self, rows: slice, n: int) -> torch.Tensor:
        """Which of the ``n`` rows of a step the processes with the same experts run, while this one runs ``rows``."""
        share, first = n // self.n_data, -(self.data % self.expert)
        return torch.cat([torch.arange(rows.start, rows.stop) + (first + i) * share for i in range(self.expert)])
