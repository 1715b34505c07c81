"""Memory of a simulated training step: fake tensors, sharded by FSDP2 among fake processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from open_mythos import MythosConfig, OpenMythos
from open_mythos.training.objective import MAX_LOGITS, readout


class Step(nn.Module):
    """Prelude, loops, coda and loss, as the objective runs them."""

    def __init__(self, model: OpenMythos, loops: int, recompute: bool) -> None:
        super().__init__()
        self.model, self.loops, self.recompute = model, loops, recompute

    def forward(self, ids: Tensor) -> Tensor:
        model = self.model
        e, ctx = model.encode(ids)
        h, held = model.first_state(e, ctx), model.recurrent.prepare(e)
        for loop in range(self.loops):
            args = h, held, loop, ctx
            step = model.recurrent.step
            h = checkpoint(step, *args, use_reentrant=False) if self.recompute else step(*args)
        x = model.decode(h, ctx).flatten(0, 1)
        chunk = MAX_LOGITS // model.cfg.vocab_size
        return readout(model.head, x, ids.flatten(), torch.ones(len(x)), chunk)[0].sum()


def peak(cfg: MythosConfig, world: int, rows: int, length: int, loops: int, recompute: bool) -> int:
    """Peak memory in bytes of one of ``world`` processes, as torch's FSDPMemTracker counts it.

    Of a step under bfloat16 autocast, with the moments of AdamW and without averaged weights.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        mesh = init_device_mesh("cpu", (world,))
        with FakeTensorMode():
            model = OpenMythos(cfg).train()
            step = Step(model, loops, recompute)
            policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # a context is no tensor
            units: list[Any] = [*model.prelude, *model.recurrent.layers, *model.coda, step]
            for unit in units:
                fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
                unit.set_reshard_after_backward(False, recurse=False)
            moments = [torch.zeros_like(p.to_local()) for p in step.parameters() for _ in range(2)]
            ids = torch.zeros(rows, length, dtype=torch.int64)
            tracker = FSDPMemTracker(step)
            tracker.track_external(*moments)
            with tracker:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = step(ids)
                loss.backward()
            (found,) = tracker.get_tracker_snapshot("peak").values()
            return found["Total"]
    finally:
        dist.destroy_process_group()
