"""Scalar metrics of depth: overthinking, convergence, path independence, and the savings of halting.

Models run in eval mode; their own mode and config are restored. Problems are those of ``depth_grid``.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from open_mythos.context import Context
from open_mythos.diagnostics import flops_per_token
from open_mythos.evaluation.depth import chunks, device_of, measuring, readings
from open_mythos.evaluation.grid import DepthGrid, check_fit, depth_grid, score_by_loops
from open_mythos.model import OpenMythos
from open_mythos.nn.exits import Exit
from open_mythos.tasks.base import UNSCORED, Batch, Task

OVERTHINKING_FACTOR = 16
"""Overthinking is measured at this multiple of the trained loops."""
ACCURACY_TOLERANCE = 0.001
"""Accuracies within this difference count as equal."""
THRESHOLDS = (0.25, 0.5, 0.9, 0.99)
"""Default values of ``cfg.act_threshold`` for :func:`compute_matched`."""


class Damage(NamedTuple):
    """Overthinking at one difficulty.

    Attributes:
        best: maximum accuracy.
        best_loops: fewest loops at which accuracy is within .001 of it.
        deepest: loops at which the damage is measured.
        damage: ``best`` minus the accuracy at ``deepest``.
    """

    best: float
    best_loops: int
    deepest: int
    damage: float


def overthinking_damage(grid: DepthGrid, trained_loops: int) -> list[Damage]:
    """Best accuracy minus that at 16 times ``trained_loops``, for each difficulty of ``grid``.

    It is measured at the largest loop count of the grid up to that, :attr:`Damage.deepest`. For models trained here,
    ``trained_loops`` is ``cfg.max_loop_iters``.
    """
    n = max(1, sum(count <= OVERTHINKING_FACTOR * trained_loops for count in grid.loops))
    damages = []
    for accuracy in grid.accuracy[:, :n]:
        best = float(accuracy.max())
        first = int((accuracy >= best - ACCURACY_TOLERANCE).int().argmax())
        damages.append(Damage(best, grid.loops[first], grid.loops[n - 1], best - float(accuracy[-1])))
    return damages


def settle_rate(
    model: OpenMythos, task: Task, difficulty: int, loops: int, examples: int = 256, seed: int = 0,
    tolerance: float = 0.01,
) -> float:  # fmt: skip
    """Share of positions whose state has converged after ``loops`` loops: ``|h_t - h_{t-1}| < tolerance |h_t|``.

    Halting is off, since the state of a halted position does not change either.

    Raises:
        ValueError: for ``loops`` below 2, and as ``depth_grid``.
    """
    if loops < 2:
        raise ValueError(f"loops={loops}; a change is between two loops, so use at least 2")
    check_fit(model, task, [difficulty], examples)
    problems = task.batch(examples, difficulty, torch.Generator().manual_seed(seed))
    converged = positions = 0
    with measuring(model, halting=False) as model:
        for part in chunks(problems, device_of(model)):
            valid = torch.ones_like(part.ids, dtype=torch.bool) if part.valid is None else part.valid.bool()
            before, after = readings(model, part.ids, [loops - 1, loops], part.valid)
            change = (after.state - before.state).float().norm(dim=-1)
            converged += int(((change < tolerance * after.state.float().norm(dim=-1)) & valid).sum())
            positions += int(valid.sum())
    return converged / positions


class FromStart(NamedTuple):
    """Accuracy from an initial state, and the share of scored predictions that differ from those from the model's."""

    accuracy: float
    differing: float


def initial_state_gap(
    model: OpenMythos, task: Task, difficulty: int, loops: int, examples: int = 256, seed: int = 0
) -> dict[str, FromStart]:
    """How predictions after ``loops`` loops depend on the initial state (path independence, 2211.09961); halting off.

    Returns:
        Results for ``"own"`` (the model's initial state), ``"zeros"`` and ``"noise"`` (standard normal).
    """
    check_fit(model, task, [difficulty], examples)
    generator = torch.Generator().manual_seed(seed)
    problems = task.batch(examples, difficulty, generator)
    starts: dict[str, Callable[[Tensor, Context], Tensor]] = {
        "own": model.first_state,
        "zeros": lambda e, ctx: torch.zeros_like(e),
        "noise": lambda e, ctx: ctx.mask.without_padding(torch.randn(e.shape, generator=generator).to(e)),
    }
    accuracy, differing, n_scored = dict.fromkeys(starts, 0.0), dict.fromkeys(starts, 0), 0
    with measuring(model, halting=False) as model:
        for part in chunks(problems, device_of(model)):
            scored, own = part.targets != UNSCORED, None
            n_scored += int(scored.sum())
            for name, start in starts.items():
                (reading,) = readings(model, part.ids, [loops], part.valid, start)
                answers = reading.logits.argmax(-1)
                own = answers if own is None else own
                accuracy[name] += float(task.score(answers, part.targets).tokens.sum()) / examples
                differing[name] += int((answers != own)[scored].sum())
    return {name: FromStart(accuracy[name], differing[name] / max(1, n_scored)) for name in starts}


class HaltingGain(NamedTuple):
    """Fixed depth compared with halting, by the gate or another exit: accuracy, mean over problems; loops run, mean
    over positions without padding; share of loops that halting saves."""

    accuracy_fixed: float
    accuracy_halting: float
    loops_fixed: float
    loops_halting: float
    saved: float


def enough_loops(
    model: OpenMythos, task: Task, difficulty: int, max_loops: int, examples: int = 256, seed: int = 0
) -> int:
    """Fewest loops, up to ``max_loops``, at which accuracy is within .001 of the best; halting off."""
    grid = depth_grid(model, task, [difficulty], range(1, max_loops + 1), examples, seed, halting=False)
    return overthinking_damage(grid, max_loops)[0].best_loops


def fixed_vs_halting(
    model: OpenMythos, task: Task, difficulties: Sequence[int], loops: int, examples: int = 256, seed: int = 0,
    exit: Exit | None = None,
) -> HaltingGain:  # fmt: skip
    """Compare fixed depth ``loops`` with early exit after at most as many, on one batch of mixed ``difficulties``.

    Positions halt by ``exit``, or by the gate if that is None.
    """
    check_fit(model, task, difficulties, examples)
    mixed = [difficulties[i % len(difficulties)] for i in range(examples)]
    return halting_gain(model, task, task.mixed(mixed, torch.Generator().manual_seed(seed)), loops, exit)


def halting_gain(model: OpenMythos, task: Task, problems: Batch, loops: int, exit: Exit | None = None) -> HaltingGain:
    """As :func:`fixed_vs_halting`, on given problems."""
    fixed, n_fixed = accuracy_and_loops(model, task, problems, loops, halting=False)
    halting, n_halting = accuracy_and_loops(model, task, problems, loops, halting=True, exit=exit)
    return HaltingGain(fixed, halting, n_fixed, n_halting, 1 - n_halting / n_fixed)


def accuracy_and_loops(
    model: OpenMythos, task: Task, problems: Batch, loops: int, halting: bool, exit: Exit | None = None
) -> tuple[float, float]:
    """Accuracy over scored tokens, mean over problems, and loops run, mean over positions."""
    with measuring(model, halting) as model:
        scores = score_by_loops(model, task, problems, [loops], exit)
    return float(scores.tokens.mean()), float(scores.loops_used)


class Point(NamedTuple):
    """FLOPs per token, accuracy, and loops run, mean over positions."""

    flops: float
    accuracy: float
    loops: float


class ComputeMatched(NamedTuple):
    """Accuracy against FLOPs, over loop counts: at fixed depth, and with halting for each ``act_threshold``."""

    fixed: list[Point]
    halting: dict[float, list[Point]]


def compute_matched(
    model: OpenMythos, task: Task, difficulty: int, loops: Sequence[int], examples: int = 256, seed: int = 0,
    thresholds: Sequence[float] = THRESHOLDS,
) -> ComputeMatched:  # fmt: skip
    """Measure accuracy against FLOPs with halting off and on, for each of ``loops`` (with halting, the maximum).

    :func:`accuracy_at` interpolates one curve at another's cost.
    """

    def curve(halting: bool, threshold: float) -> list[Point]:
        with measuring(model, act_threshold=threshold) as changed:
            grid = depth_grid(changed, task, [difficulty], loops, examples, seed, halting)
        context = (task.length(difficulty) + 1) // 2  # mean over the tokens
        rows = zip(grid.accuracy[0].tolist(), grid.loops_used[0].tolist(), strict=True)
        cfg = replace(model.cfg, halting=halting)  # at fixed depth the gate is not computed
        return [Point(flops_per_token(cfg, used, context), accuracy, used) for accuracy, used in rows]

    fixed = curve(False, model.cfg.act_threshold)
    return ComputeMatched(fixed, {threshold: curve(True, threshold) for threshold in thresholds})


def accuracy_at(curve: Sequence[Point], flops: float) -> float:
    """Accuracy of ``curve`` at a cost, linearly interpolated; constant beyond its ends."""
    xs, ys, _ = zip(*sorted(curve), strict=True)
    return float(np.interp(flops, xs, ys))
