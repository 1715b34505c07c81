"""What a run will cost, found by making its first steps and throwing them away."""

from __future__ import annotations

import time
import weakref
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from open_mythos import tasks
from open_mythos.diagnostics import flops_per_token
from open_mythos.training.config import TrainConfig
from open_mythos.training.objective import Objective
from open_mythos.training.trainer import Trainer

_DRAWS = 256  # steps over which loop counts and problem lengths are averaged
_TRIAL_STEPS, _TRIAL_SECONDS = 10, 10.0  # as many steps as fit, at most
# In units of a forward pass: a backward pass is two, and recomputation one more.
_WITH_GRADIENT, _RECOMPUTED = 3, 4


@dataclass(frozen=True)
class RunCost:
    """Cost of a run, or of each step where it says so.

    Attributes:
        parameters: all of them.
        flops_per_step: expected floating-point operations, by :func:`flops_per_step`.
        weight_bytes: weights, gradients, optimizer state and averaged weights.
        activation_bytes: what the backward pass needs kept, the most of any trial step.
        seconds_per_step: mean of the trial steps; checkpoints and evaluation come on top.
        trial_steps: how many there were.
    """

    parameters: int
    flops_per_step: float
    weight_bytes: int
    activation_bytes: int
    seconds_per_step: float
    trial_steps: int


def run_cost(cfg: TrainConfig) -> RunCost:
    """Make a few steps of the run, in memory, and measure them.

    Raises:
        ValueError: as :class:`~open_mythos.training.trainer.Trainer`.
    """
    trainer = Trainer(cfg)
    times: list[float] = []
    trainer.step()  # the first one warms up
    while len(times) < _TRIAL_STEPS and (not times or sum(times) < _TRIAL_SECONDS):
        code, started = _n_compiled(cfg), time.perf_counter()
        trainer.step()
        if _n_compiled(cfg) == code:  # a step that compiles says nothing about the others
            times.append(time.perf_counter() - started)
    activations = activation_bytes(trainer, min(len(times), 3))
    return RunCost(
        sum(p.numel() for p in trainer.model.parameters()),
        flops_per_step(cfg),
        weight_bytes(trainer),
        activations,
        sum(times) / len(times),
        len(times),
    )


def weight_bytes(trainer: Trainer) -> int:
    """Weights, gradients, averaged weights, and the optimizer's state, which is there after the first step."""
    return 3 * _bytes(list(trainer.model.parameters())) + _bytes(trainer.optimizer.state_dict())


def activation_bytes(trainer: Trainer, steps: int) -> int:
    """What the backward pass needs kept, the most at any time in so many further steps."""
    kept = _Kept(trainer.model)
    with kept:
        for _ in range(steps):
            trainer.step()
    return kept.most


def flops_per_step(cfg: TrainConfig) -> float:
    """Expected floating-point operations of a step, from as many of its random draws as make a steady mean.

    Matrix products only, as :func:`~open_mythos.diagnostics.flops_per_token` counts them, at a token's mean context of
    half the problem. A loop without gradient counts once, one with it three times, or four if it is recomputed; coda
    and head count for every loop that is asked for an answer.
    """
    generator, objective = torch.Generator().manual_seed(cfg.seed), Objective(cfg)
    task = tasks.load(cfg.task.name, **cfg.task.options)
    low, high = cfg.task.min_difficulty, cfg.task.max_difficulty
    loud = _RECOMPUTED if cfg.checkpoint_loops else _WITH_GRADIENT
    progressive = cfg.loss.progressive if cfg.loss.depth == "progressive" else 0.0
    total = 0.0
    for draw in range(_DRAWS):
        length = task.length(int(torch.randint(low, high + 1, (), generator=generator)))
        plan = objective.plan(draw * cfg.steps // _DRAWS, cfg.batch_size, length, generator)
        runs = [(plan.n_loops, plan.n_grad)] if progressive < 1 else []
        runs += [(plan.short_loops, plan.short_grad)] if progressive > 0 else []
        context = (length + 1) // 2
        outside = flops_per_token(cfg.model, 0, context)
        answer = flops_per_token(replace(cfg.model, prelude_layers=0), 0, context)
        loop = flops_per_token(cfg.model, 1, context) - outside
        passes = sum(float((n_loops + (loud - 1) * n_grad).float().mean()) for n_loops, n_grad in runs)
        if cfg.loss.supervises_every_loop:
            answers = loud * sum(float(n_grad.float().mean()) for _, n_grad in runs)
        else:
            answers = _WITH_GRADIENT * len(runs)
        total += cfg.batch_size * length * (_WITH_GRADIENT * (outside - answer) + passes * loop + answers * answer)
    return total / _DRAWS


def _n_compiled(cfg: TrainConfig) -> int:
    """What ``torch.compile`` has made so far, if the run goes through it."""
    if not cfg.compile:
        return 0
    from torch._dynamo.utils import counters  # which takes a second to import

    return counters["stats"]["unique_graphs"]


class _Holder:
    """A tensor that autograd keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts what autograd keeps inside of it.

    Attributes:
        most: bytes, the greatest at any time; a storage counts once, the model's parameters never.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(self._pack, lambda holder: holder.tensor)
        self.own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.holders: Counter[int] = Counter()  # of each storage, by its address
        self.now = self.most = 0

    def _pack(self, tensor: Tensor) -> _Holder:
        holder, storage = _Holder(tensor), tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in self.own:
            self.now += size if self.holders[address] == 0 else 0
            self.most = max(self.most, self.now)
            self.holders[address] += 1
            weakref.finalize(holder, self._drop, address, size)
        return holder

    def _drop(self, address: int, size: int) -> None:
        self.holders[address] -= 1
        self.now -= size if self.holders[address] == 0 else 0


def _bytes(state: Any) -> int:
    """Bytes of all tensors inside."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        state = list(state.values())
    return sum(_bytes(item) for item in state) if isinstance(state, list) else 0
