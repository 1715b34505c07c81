"""Several processes that train one model, as ``torchrun`` starts them, or one, for which nothing here does anything."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from open_mythos.nn.feed_forward import MoEFFN

_PATIENCE = timedelta(hours=12)  # process 0 may have a long corpus to read before the others


def rank() -> int:
    """The number of this process, from 0 on."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def find_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is a GPU, each process of a machine its own, or the CPU if there is none.

    Raises:
        ValueError: for a device that is unknown or not available.
    """
    if name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if name == "auto":
        return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if world_size() > 1 else torch.device("cuda")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).partition("\n")[0]
        raise ValueError(f"device={name!r} cannot be used ({first_line}); use 'auto' or 'cpu'") from error
    return device


@contextmanager
def processes() -> Iterator[None]:
    """Processes can talk to each other inside."""
    if world_size() == 1 or dist.is_initialized():
        yield
        return
    backend = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def first_process_first() -> Iterator[None]:
    """What is inside is done by process 0, then by the others, who find what it left."""
    if rank() > 0:
        wait()
    yield
    if rank() == 0:
        wait()


def wait() -> None:
    """Until all processes are here."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(()))


def add_up(numbers: list[float]) -> list[float]:
    """The sums over all processes."""
    if world_size() == 1:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def add_up_gradients(model: nn.Module) -> None:
    """Each parameter's gradient becomes the sum over all processes; none where none has any."""
    if world_size() == 1:
        return
    parameters = list(model.parameters())
    has = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    dist.all_reduce(has)
    used = [p for p, n in zip(parameters, has.tolist(), strict=True) if n]
    for p in used:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    flat = torch.cat([p.grad.flatten() for p in used if p.grad is not None])
    dist.all_reduce(flat)
    for p, part in zip(used, flat.split([p.numel() for p in used]), strict=True):
        p.grad = part.view_as(p)


@contextmanager
def counting_together(model: nn.Module) -> Iterator[None]:
    """What experts are chosen for inside counts for all processes, and for one optimizer step."""
    experts = [module for module in model.modules() if isinstance(module, MoEFFN)]
    if world_size() == 1:
        yield
        return
    before: list[Tensor] = [module.expert_load.clone() for module in experts]
    yield
    for module, load in zip(experts, before, strict=True):
        module.expert_load -= load
        dist.all_reduce(module.expert_load)
        module.expert_load += load


def gathered(mine: Any) -> list[Any]:
    """What each process has, in the order of their numbers."""
    if world_size() == 1:
        return [mine]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, mine)
    return found
