"""Cost of a run, measured on a few trial steps."""

import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from open_mythos import tasks
from open_mythos.diagnostics import flops_per_token
from open_mythos.training import baselines
from open_mythos.training.config import TrainConfig
from open_mythos.training.fit import measure
from open_mythos.training.gate import ROUNDS, train_gate
from open_mythos.training.objective import Objective
from open_mythos.training.trainer import Trainer

_N_DRAWS = 256  # simulated steps over which loop counts and problem lengths are averaged
_TRIAL_STEPS, _TRIAL_SECONDS = 10, 10.0  # limits, whichever comes first
_TRIAL_LOOPS = 4
_GRAD_COST, _RECOMPUTE_COST = 3, 4  # in forward passes: backward is two, recomputation one more


@dataclass(frozen=True)
class RunCost:
    """Cost of a run, by the functions below; ``seconds_per_step`` is without checkpoints."""

    parameters: int
    flops_per_step: float
    weight_bytes: int
    activation_bytes: int
    seconds_per_step: float
    trial_steps: int
    gate_seconds: float
    evaluation_seconds: float


def run_cost(cfg: TrainConfig, progress: Callable[[str], None] | None = None) -> RunCost:
    """Measure a few training steps, and small samples of gate training and evaluation, without writing a run.

    Raises:
        ValueError: as :class:`~open_mythos.training.trainer.Trainer`.
    """
    begin = progress or (lambda stage: None)
    begin("trial steps")
    trainer = Trainer(cfg)
    for growth in trainer.growths.values():
        growth.size = 1.0  # steps are slowest, and largest, once problems have grown
    times: list[float] = []
    trainer.step()  # warm-up
    while len(times) < _TRIAL_STEPS and (not times or sum(times) < _TRIAL_SECONDS):
        n_graphs, start = _n_compiled_graphs(cfg), time.perf_counter()
        trainer.step()
        if _n_compiled_graphs(cfg) == n_graphs:  # steps that compile do not count
            times.append(time.perf_counter() - start)
    activations = activation_bytes(trainer, min(len(times), 3))
    n_parameters, n = sum(p.numel() for p in trainer.model.parameters()), len(times)
    seconds = sum(times) / n
    after = gate_seconds(trainer, begin), evaluation_seconds(trainer, seconds, begin)
    return RunCost(n_parameters, flops_per_step(cfg), weight_bytes(trainer), activations, seconds, n, *after)


def gate_seconds(trainer: Trainer, begin: Callable[[str], None]) -> float:
    """Seconds to train the halting gate, extrapolated from fewer loops and, in the same proportion, fewer steps."""
    cfg, model = trainer.cfg, trainer.averaged()
    if cfg.kind != "looped" or cfg.gate.steps == 0:
        return 0.0
    loops = cfg.gate.loops or cfg.model.max_loop_iters
    few = min(loops, _TRIAL_LOOPS)
    gate, start = replace(cfg.gate, loops=few, steps=max(ROUNDS, cfg.gate.steps * few // loops)), time.perf_counter()
    train_gate(model, trainer.task, gate, cfg.task.min_difficulty, cfg.hardest_for_gate, torch.Generator(), begin)
    return (time.perf_counter() - start) * loops / few


def evaluation_seconds(trainer: Trainer, seconds_per_step: float, begin: Callable[[str], None]) -> float:
    """Seconds to evaluate, extrapolated from fewer loops, and from as many examples as take about a second."""
    cfg, model, wanted = trainer.cfg, trainer.averaged(), trainer.cfg.evaluation
    model.cfg.halting = cfg.kind == "looped" and cfg.gate.steps > 0  # as the gate's training leaves it
    loops = max(cfg.depths)
    few = min(loops, 4 * _TRIAL_LOOPS) if cfg.kind == "looped" else loops
    in_a_second = cfg.batch_size * trainer.task.length(cfg.task.max_difficulty) / seconds_per_step
    in_a_second /= sum(map(trainer.task.length, wanted.difficulties))
    examples = min(wanted.examples, max(1, int(in_a_second)))
    shallow = sorted({max(1, n * few // loops) for n in wanted.loops})
    trial = replace(cfg, evaluation=replace(wanted, loops=shallow, examples=examples))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        measure(model, trainer.task, trial, Path(folder), begin)
        return (time.perf_counter() - start) * loops / few * wanted.examples / examples


def weight_bytes(trainer: Trainer) -> int:
    """Bytes of weights, of gradients and averages of trained ones, and of the optimizer's state (after a step)."""
    states = [state for part in trainer.optimizer.parts for state in part.state.values()]
    state_bytes = sum(x.nbytes for state in states for x in state.values() if isinstance(x, Tensor))
    return sum((3 if p.requires_grad else 1) * p.nbytes for p in trainer.model.parameters()) + state_bytes


def activation_bytes(trainer: Trainer, steps: int) -> int:
    """Peak bytes saved for the backward pass, over ``steps`` further steps."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in trainer.model.parameters()}
    references: Counter[int] = Counter()  # by address: a storage saved twice counts once, and parameters do not count
    current = peak = 0

    def pack(tensor: Tensor) -> _Saved:
        nonlocal current, peak
        saved, storage = _Saved(tensor), tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in parameters:
            current += size if references[address] == 0 else 0
            peak = max(peak, current)
            references[address] += 1
            weakref.finalize(saved, free, address, size)
        return saved

    def free(address: int, size: int) -> None:
        nonlocal current
        references[address] -= 1
        current -= size if references[address] == 0 else 0

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        for _ in range(steps):
            trainer.step()
    return peak


def flops_per_step(cfg: TrainConfig) -> float:
    """Expected FLOPs of a step, averaged over random draws of loops and lengths; with ``task.growth`` at full size.

    Matrix products only, as in :func:`~open_mythos.diagnostics.flops_per_token`, at the mean context of half the
    problem. A loop costs one forward pass without gradient, three with it, four if recomputed; coda and head are
    counted for every supervised loop.
    """
    generator, objective = torch.Generator().manual_seed(cfg.seed), Objective(cfg)
    task, shape = tasks.load(cfg.task.name, **cfg.task.options), baselines.shape(cfg)
    low, high = cfg.task.min_difficulty, cfg.task.max_difficulty
    grad_cost = _RECOMPUTE_COST if cfg.checkpoint_loops else _GRAD_COST
    progressive = cfg.loss.progressive if cfg.loss.depth == "progressive" else 0.0
    total = 0.0

    @cache
    def parts(context: int) -> tuple[float, float, float]:
        outside = flops_per_token(shape, 0, context)
        readout = flops_per_token(replace(shape, prelude_layers=0), 0, context)
        return outside, readout, flops_per_token(shape, 1, context) - outside

    for draw, share in product(range(_N_DRAWS), task.shares()):
        difficulty = int(torch.randint(low, high + 1, (), generator=generator))
        length, step = share.task.length(difficulty), draw * cfg.steps // _N_DRAWS
        plan = objective.plan(step, cfg.batch_size, length, generator, share.task.n_steps(difficulty))
        passes = plan.schedules(progressive)
        outside, readout, loop = parts((length + 1) // 2)
        loops = sum(float((n_loops + (grad_cost - 1) * n_grad).float().mean()) for n_loops, n_grad in passes)
        if cfg.loss.supervises_every_loop:
            readouts = grad_cost * sum(float(n_grad.float().mean()) for _, n_grad in passes)
        else:
            readouts = _GRAD_COST * len(passes)
        total += cfg.batch_size * length * (_GRAD_COST * (outside - readout) + loops * loop + readouts * readout)
    return total / _N_DRAWS


def _n_compiled_graphs(cfg: TrainConfig) -> int:
    if not cfg.compile:
        return 0
    from torch._dynamo.utils import counters  # slow to import

    return counters["stats"]["unique_graphs"]


@dataclass(eq=False)
class _Saved:
    """A tensor saved by autograd, finalized when autograd frees it."""

    tensor: Tensor
