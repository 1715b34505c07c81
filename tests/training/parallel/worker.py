"""Forks processes that train tiny models: python worker.py FOLDER < groups, each [processes, [[function, ...], ...]].

FOLDER/found.pt holds, by group and job, what the function returned in process 0, or the error of any process.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp
from tiny import tiny_run
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from open_mythos.ops import experts
from open_mythos.training import checkpoints, distributed
from open_mythos.training.fit import Watch, fit
from open_mythos.training.parallel import experts as parallel_experts
from open_mythos.training.trainer import Lost, Trainer

FOLDER = Path()
PATIENCE = 60  # timeout of collectives in seconds, which turns a hang into an error


def new_trainer(*overrides: str) -> Trainer:
    return Trainer(tiny_run(f"parallel.timeout={PATIENCE}", *overrides))


def trained(steps: int, *overrides: str, start: str = "", end: str = "") -> dict[str, Any]:
    """Train from the checkpoint in ``start``, if given: the results of each step, and the full weights and averages."""
    trainer = new_trainer(*overrides)
    if start:
        trainer.load_state_dict(newest(start))
    results = [trainer.step() for _ in range(steps)]
    assert not any(result.skipped for result in results)
    if end:
        checkpoints.save(FOLDER / end, steps, trainer.state_dict(), None)
    averages = trainer.parallel.gathered(trainer.ema.average)
    return {
        "steps": [[r.loss, r.grad_norm, r.loops, r.accuracy, *r.parts.values()] for r in results],
        "weights": trainer.parallel.gathered(trainer.parallel.held) | {f"average.{n}": x for n, x in averages.items()},
        "load": trainer.expert_load,
        "size": trainer.gauges()["spectral_radius"],
    }


def in_halves(steps: int, *overrides: str) -> dict[str, Any]:
    """As :func:`trained`, in two halves, the second with a new trainer that loads the state of the first."""
    trained(steps // 2, *overrides, end="half")
    return trained(steps - steps // 2, *overrides, start="half")


def newest(folder: str) -> dict[str, Any]:
    found = checkpoints.newest(FOLDER / folder, print)
    assert found is not None
    return found[1]


def saved(steps: int, n_more: int, folder: str, *overrides: str) -> list[float]:
    """Losses of ``n_more`` steps after ``steps``, whose state is saved to ``folder`` in the background: several
    processes write it only when all steps have run."""
    trainer, saving = new_trainer(*overrides), checkpoints.Saving(FOLDER / folder)
    for _ in range(steps):
        trainer.step()
    write, are_made = checkpoints.save, threading.Event()
    checkpoints.save = lambda *args: (saving.group is None or are_made.wait(), write(*args))[1]
    saving.begin(steps, trainer.state_dict(), None)
    losses = [trainer.step().loss for _ in range(n_more)]
    are_made.set()
    saving.end()
    checkpoints.save = write
    return losses


def loaded(n_more: int, folder: str, *overrides: str) -> dict[str, Any]:
    """Resume from ``folder``: the parts of the state that are not bit for bit as saved, and the next losses."""
    trainer, again = new_trainer(*overrides), f"{folder}-{dist.get_world_size()}-{'-'.join(overrides)}"
    trainer.load_state_dict(newest(folder))
    checkpoints.save(FOLDER / again, 1, trainer.state_dict(), None)
    states = [newest(name) for name in (again, folder)]
    mine, expected = (dict(leaves(state) if dist.get_rank() == 0 else ()) for state in states)
    differing = sorted(mine.keys() ^ expected.keys())
    differing += [name for name, value in expected.items() if name in mine and not same(value, mine[name])]
    return {"differing": differing, "n": len(expected), "losses": [trainer.step().loss for _ in range(n_more)]}


def leaves(state: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(state, dict | list):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            if key != "config":
                yield from leaves(value, f"{name}/{key}")
    else:
        yield name, state[()] if isinstance(state, checkpoints.Stored) else state


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


def stopped(folder: str, *overrides: str) -> list[Any]:
    """The exit codes of both processes, where the second gets a signal while the third step is logged."""
    processes, code = distributed.gathered(os.getpid()), None

    def record(line: Any) -> None:
        if line["step"] == 3:
            os.kill(processes[1], signal.SIGHUP)

    try:
        fit(tiny_run(f"parallel.timeout={PATIENCE}", *overrides), FOLDER / folder, "auto", Watch(record, print))
    except SystemExit as left:
        code = left.code
    return distributed.gathered(code)


def slow(*overrides: str) -> list[Any]:
    """``StepResult.heard`` of a step in which the second of two processes was slow to draw its batch."""
    trainer = new_trainer(*overrides)
    if dist.get_rank() == 1:
        trainer.draw = lambda draw=trainer.draw: (time.sleep(0.2), draw())[1]  # type: ignore[method-assign]
    return [trainer.step(dist.get_rank).heard for _ in range(3)][-1]


class Collectives(TorchDispatchMode):
    """Counts collectives and the elements that they transfer."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.numbers, self.most = Counter[str](), Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function._schema.name.split("::")[1].strip("_")
            self.found[name] += 1
            numbers = max(x.numel() for x in pytree.tree_leaves(args) if isinstance(x, torch.Tensor))
            self.numbers[name] += numbers
            self.most[name] = max(self.most[name], numbers)
        return function(*args, **(kwargs or {}))


def collectives(*overrides: str) -> dict[str, Any]:
    """Collectives of the second step's forward and backward pass; the number of FSDP units, and the length of a row."""
    trainer = new_trainer(*overrides)
    trainer.step()
    drawn = trainer.draw()
    with Collectives() as mode:
        trainer.forward_backward(drawn)
    own = {"units": len(trainer.parallel.units), "length": drawn[0].batch.ids.shape[1]}
    own |= {"numbers": dict(mode.numbers), "most": dict(mode.most)}
    return dict(mode.found) | own


class WithoutHooks(torch.nn.Module):
    """Calls a block's forward without its hooks."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.hidden = [block]

    def forward(self, *args: Any, **options: Any) -> Any:
        self.hidden[0].unshard()
        return self.hidden[0].forward(*args, **options)


def bypassed(*overrides: str) -> str:
    """The error when a block is unsharded by hand and called without FSDP's hooks."""
    trainer = new_trainer(*overrides)
    trainer.model.recurrent.block = WithoutHooks(trainer.model.recurrent.block)
    try:
        trainer.step()
    except RuntimeError as error:
        return str(error)
    return ""


def abandoned(*overrides: str) -> str:
    """The error of the first of two processes when the other never reaches the second step."""
    trainer = new_trainer(*overrides, "parallel.timeout=3")
    trainer.step()
    if dist.get_rank() == 1:
        time.sleep(8)
        os._exit(0)
    try:
        trainer.step()
    except Lost as error:
        return str(error)
    return ""


def seconds(rows: int, *overrides: str) -> float:
    """Median time of a routed layer's forward and backward pass over ``rows`` tokens."""
    trainer = new_trainer(*overrides)
    ffn, times = trainer.model.recurrent.block.ffn, []
    dim = trainer.cfg.model.dim
    for _ in range(9):
        x = torch.randn(rows, dim, requires_grad=True)
        start = time.perf_counter()
        ffn(x).sum().backward()
        times.append(time.perf_counter() - start)
    return sorted(times)[4]


def dispatched(spent: int, dtype: str) -> float:
    """Largest relative error of results and gradients of 600 experts divided among two processes, against one process.

    The processes have 3 and 5 tokens, then 0 and 7; ``spent`` replaces ``_SPENT`` of :mod:`.parallel.experts`.
    """
    parallel_experts._SPENT, rank, found = spent, dist.get_rank(), 0.0
    torch.manual_seed(0)
    for tokens in ([3, 5], [0, 7]):
        mine = slice(tokens[0] * rank, tokens[0] + tokens[1] * rank)
        x, gate_up, down, to = (torch.randn(*shape) for shape in ((sum(tokens), 8), (600, 8, 8), (600, 8, 4), (1, 8)))
        chosen, weights = torch.rand(sum(tokens), 600).topk(3).indices, torch.rand(sum(tokens), 3)
        here = slice(300 * rank, 300 * rank + 300)
        both = [[x, gate_up, down, weights, to.repeat(sum(tokens), 1)]]
        both += [[x[mine], gate_up[here], down[here], weights[mine], to.repeat(tokens[rank], 1)]]
        whole, part = ([one.to(getattr(torch, dtype)).requires_grad_() for one in given] for given in both)
        dispatch = parallel_experts.Dispatch(dist.group.WORLD)
        dispatch.tokens = tokens
        ran = [
            engine(*given[:3], ids, given[3], (0.5, 2.0), given[4])
            for engine, given, ids in ((experts.swiglu_experts, whole, chosen), (dispatch, part, chosen[mine]))
        ]
        grads = [torch.autograd.grad(out.square().sum(), given) for out, given in zip(ran, (whole, part), strict=True)]
        places = mine, mine, here, here, mine, mine
        for one, other, place in zip((ran[0], *grads[0]), (ran[1], *grads[1]), places, strict=True):
            if other.numel():
                found = max(found, float((one[place] - other).abs().max() / one.abs().max()))
    return max(distributed.gathered(found))


def run(rank: int, world: int, jobs: list[Any], name: str) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    experts.MAX_GATHERED = 0  # no separate code path for a token or two
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    store, patience = f"file://{FOLDER / name}.store", timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=patience)
    found: list[Any] = []
    for function, *args in jobs:
        start = time.perf_counter(), time.process_time()
        try:
            found.append(globals()[function](*args))
            if rank == 0 and os.environ.get("TIMED"):
                took = time.perf_counter() - start[0], time.process_time() - start[1]
                print(world, function, *args, [round(x, 2) for x in took], file=sys.stderr, flush=True)
        except Exception:
            found.append(f"process {rank}: {traceback.format_exc()}")
            break
    if rank == 0 or len(found) < len(jobs):
        torch.save(found, FOLDER / f"{name}.{rank}")
    os._exit(0)  # shutting gloo down sometimes hangs on a busy machine, and is not tested here


def main() -> None:
    fork, found = multiprocessing.get_context("fork"), []
    for i, (world, jobs) in enumerate(json.load(sys.stdin)):
        processes = [fork.Process(target=run, args=(rank, world, jobs, f"group{i}")) for rank in range(world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        found.append([torch.load(path, weights_only=False) for path in sorted(FOLDER.glob(f"group{i}.[0-9]"))])
    torch.save(found, FOLDER / "found.pt")


if __name__ == "__main__":
    FOLDER = Path(sys.argv[1])
    main()
