"""Helpers for several processes that train one model, as ``torchrun`` starts them; trivial for a single process."""

import os
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from open_mythos.fields import must

_PATIENCE = timedelta(hours=12)  # timeout of collectives: the others wait while process 0 reads a long corpus


def rank() -> int:
    """Rank of this process, from 0 on."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def device_with_room(device: torch.device, n_bytes: int) -> torch.device:
    """``device``, or the CPU in place of a GPU with less than ``2 * n_bytes`` free."""
    has_room = device.type != "cuda" or torch.cuda.mem_get_info(device)[0] >= 2 * n_bytes
    return device if has_room else torch.device("cpu")


def find_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is a GPU, or the CPU if there is none.

    With several processes on a machine, each gets a GPU of its own unless the name has an index.

    Raises:
        ValueError: for a device that is unknown or not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        must(device.type != "meta", f"device={name!r} cannot compute anything; use 'auto' or 'cpu'")
        if device.type == "cuda" and device.index is None and world_size() > 1:
            must("LOCAL_RANK" in os.environ, "LOCAL_RANK is not set, so no process knows its GPU; start with torchrun")
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)  # FSDP and NCCL use the current device
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).partition("\n")[0]
        raise ValueError(f"device={name!r} cannot be used ({first_line}); use 'auto' or 'cpu'") from error
    return device


@contextmanager
def processes() -> Iterator[None]:
    """Initialise the default process group for the block, if there are several processes."""
    if world_size() == 1 or dist.is_initialized():
        yield
        return
    backend = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo"
    own: dict[str, Any] = {}
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        own = {"store": _fresh_store(), "rank": rank(), "world_size": world_size()}
    dist.init_process_group(backend, timeout=_PATIENCE, **own)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _fresh_store() -> dist.Store:
    """The store of torchrun, with a prefix that the processes agree on after each start.

    The store outlives restarts of the processes, and old entries, such as addresses of dead processes, would be read as
    if they were new (pytorch issues 135712, 167288). Each other process posts a random word under its rank, and the
    first process answers under that word with the prefix, until all have acknowledged it.
    """
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=_PATIENCE)
    name = uuid.uuid4().hex
    if rank() > 0:
        store.set(f"word/{rank()}", name)
        name = store.get(name).decode()
        store.set(f"{name}/{rank()}", "")
    missing = list(range(1, world_size())) if rank() == 0 else []
    while missing := [i for i in missing if not store.check([f"{name}/{i}"])]:
        for i in missing:
            if store.check([f"word/{i}"]):  # may be one from before a restart: then nobody reads the answer
                store.set(store.get(f"word/{i}").decode(), name)
        time.sleep(0.01)
    return dist.PrefixStore(name, store)


@contextmanager
def first_process_first() -> Iterator[None]:
    """Run the block in process 0 first, then in the others, which find the files it made; if it fails, they exit."""
    if not dist.is_initialized():
        yield
        return
    if rank() > 0 and add_up([0.0])[0]:
        raise SystemExit(2)  # process 0 reports the error
    failed = 1.0
    try:
        yield
        failed = 0.0
    finally:
        if rank() == 0:
            add_up([failed])


def wait() -> None:
    """Wait until all processes have called this (barrier)."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(()))


def said_by_others(error: BaseException, hurried: Callable[[], float] = float, patience: float = 2.0) -> str:
    """Message naming the collective that has failed and the processes it waited for; "" for other errors.

    Other waiting processes fail too and post this in the store; those that do not within ``patience`` seconds, or a
    quarter of it if ``hurried``, are the missing ones.
    """
    calls = [frame.name for frame in traceback.extract_tb(error.__traceback__) if "distributed_c10d" in frame.filename]
    if not calls or not dist.is_initialized():
        return ""
    missing = "others"
    with suppress(RuntimeError):  # the process that hosts the store has ended
        store = dist.distributed_c10d._get_default_store()
        store.set(f"waited/{rank()}", "")
        start = time.monotonic()
        while time.monotonic() - start < (patience / 4 if hurried() else patience):
            time.sleep(0.05)
        lost = [str(i) for i in range(world_size()) if not store.check([f"waited/{i}"])]
        missing = f"process {', '.join(lost)}" if lost else missing
    return f"process {rank()} waited for {missing} in {calls[-1]}"


def add_up(numbers: list[float]) -> list[float]:
    """Sum each number over all processes."""
    if world_size() == 1:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def gathered(mine: Any, group: Any = None) -> list[Any]:
    """Objects of all processes, in the order of their ranks."""
    if world_size() == 1:
        return [mine]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, mine, group)
    return found


def background() -> Any:
    """A group of all processes for collectives in a background thread of each; None for a single process."""
    return None if world_size() == 1 else dist.new_group(backend="gloo", timeout=_PATIENCE)
