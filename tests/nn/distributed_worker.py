"""One of two processes that train models: python distributed_worker.py RANK STORE. Prints router bias and gate."""

import json
import os
import sys
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import tiny_config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from open_mythos import OpenMythos
from open_mythos.nn.block import TransformerBlock

STEPS, ROWS = 3, 4
WAYS = ("replicated", "sharded", "no halting")


def sharded(model: OpenMythos) -> OpenMythos:
    mesh = init_device_mesh("cpu", (2,))
    for module in list(model.modules()):
        if isinstance(module, TransformerBlock):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train(model: torch.nn.Module, rows: slice) -> dict[str, list]:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(STEPS):
        ids = torch.randint(11, (ROWS, 9), generator=torch.Generator().manual_seed(step))[rows]
        optimizer.zero_grad()
        F.cross_entropy(model(ids, n_loops=2)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    core = model.module.recurrent if isinstance(model, DistributedDataParallel) else model.recurrent
    gate = core.act.halt.weight
    return {
        "bias": core.block.ffn.router_bias.tolist(),
        "gate": (gate.full_tensor() if hasattr(gate, "full_tensor") else gate).flatten().tolist(),
    }


def new_model(**changes) -> OpenMythos:
    torch.manual_seed(0)
    return OpenMythos(tiny_config(n_experts=4, **changes)).train()


def trained(rank: int, way: str) -> dict[str, list]:
    model = new_model(halting=way != "no halting")
    wrapped = sharded(model) if way == "sharded" else DistributedDataParallel(model)
    return train(wrapped, slice(rank * ROWS // 2, (rank + 1) * ROWS // 2))


def main(rank: int, store: str) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    print(json.dumps({way: trained(rank, way) for way in WAYS}), flush=True)
    dist.barrier()
    os._exit(0)  # shutting gloo down sometimes hangs on a busy machine, and is not tested here


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
