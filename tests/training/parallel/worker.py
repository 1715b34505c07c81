"""One of several processes that train tiny models, and writes what it finds."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from tiny import tiny_run

from open_mythos.training.trainer import Trainer

STEPS = 5


def losses_and_weights(*overrides: str, steps: int = STEPS) -> dict[str, Any]:
    """Of a few steps: losses, gradient norms, and the weights after, and their averages, whole."""
    trainer = Trainer(tiny_run(*overrides))
    results = [trainer.step() for _ in range(steps)]
    assert not any(result.skipped for result in results)
    state = trainer.state_dict()
    return {
        "losses": [[r.loss, r.grad_norm, r.loops, r.accuracy] for r in results],
        "weights": state["model"] | {f"average.{name}": x for name, x in state["ema"]["average"].items()},
        "load": trainer.expert_load,
        "gauges": trainer.gauges(),
    }


def main(rank: int, world: int, jobs: list[Any], store: str, out: str) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=30)
    )
    found: list[Any] = []
    for job in jobs:
        try:
            found.append(losses_and_weights(*job))
        except Exception:
            found.append(traceback.format_exc())
            break
    if rank == 0 or isinstance(found[-1], str):
        torch.save(found, f"{out}.{rank}")
    sys.stdout.flush()
    if not isinstance(found[-1], str):
        dist.barrier()
    os._exit(0)  # taking gloo down hangs now and then on a busy machine, and is not what is tested

