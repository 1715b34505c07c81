"""A user's training loop with DistributedDataParallel or fully_shard equals the plain loop, in one process."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import ATTENTION, assert_near, tiny_model, tokens
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from open_mythos import OpenMythos
from open_mythos.nn.block import TransformerBlock

pytestmark = pytest.mark.filterwarnings("default")  # warnings of PyTorch itself


@contextmanager
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def train(model: torch.nn.Module, micro_batches: int = 1) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(2):
        optimizer.zero_grad()
        for ids in tokens(micro_batches, 8, 7, seed=step):
            F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).div(micro_batches).backward()
        optimizer.step()


def alone(attn_type: str = "gqa", micro_batches: int = 1, **changes) -> dict[str, torch.Tensor]:
    model = tiny_model(attn_type, warm_start=True, **changes).train()
    train(model, micro_batches)
    return model.state_dict()


def assert_same(model: OpenMythos, expected: dict[str, torch.Tensor]) -> None:
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        assert_near(whole.float(), expected[name].float(), 1e-5, name)


@pytest.mark.parametrize("halting, micro_batches", [(True, 1), (True, 2), (False, 1)])
def test_ddp_training_equals_plain_training(halting, micro_batches):
    """Also without halting, where the gate is not trained but still needs a gradient in every process."""
    expected = alone(micro_batches=micro_batches, halting=halting)
    with one_process():
        model = tiny_model(warm_start=True, halting=halting).train()
        train(DistributedDataParallel(model), micro_batches)
        assert_same(model, expected)


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_training_with_fully_sharded_blocks_equals_plain_training(attn_type):
    expected = alone(attn_type)
    with one_process():
        model, mesh = tiny_model(attn_type, warm_start=True).train(), init_device_mesh("cpu", (1,))
        for module in list(model.modules()):
            if isinstance(module, TransformerBlock):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        train(model)
        assert_same(model, expected)


@pytest.mark.parametrize("sharded", ["blocks", "core"])
def test_sharded_blocks_run_in_bfloat16_in_a_float32_model(sharded):
    ids = tokens(2, 6)
    with one_process():
        model, mesh = tiny_model().train(), init_device_mesh("cpu", (1,))
        expected = model(ids, 2, auxiliary=False)
        modules = [model.recurrent] if sharded == "core" else list(model.modules())
        for module in modules:
            if isinstance(module, TransformerBlock) or sharded == "core":
                policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
                fully_shard(module, mesh=mesh, mp_policy=policy)
        logits = model(ids, 2, auxiliary=False)
        logits.sum().backward()
        assert_near(logits, expected, 0.1)
