"""Single numbers about depth: does more of it harm, does it settle, does the start matter, does halting pay?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.context import Context
from open_mythos.diagnostics import flops_per_token
from open_mythos.evaluation.depth import chunks, device_of, measuring, readings
from open_mythos.evaluation.grid import DepthGrid, check_fit, depth_grid, score_by_loops
from open_mythos.model import OpenMythos
from open_mythos.tasks.base import UNSCORED, Task

BEYOND = 16
"""How many times deeper than in training overthinking is looked for."""
SAME = 0.001
"""Accuracies no further apart are called equal."""
THRESHOLDS = (0.25, 0.5, 0.9, 0.99)
"""Values of ``cfg.act_threshold`` from hasty to patient."""


class Damage(NamedTuple):
    """What too many loops cost at one difficulty.

    Attributes:
        best: greatest accuracy.
        best_loops: fewest loops that reach it, to within .001.
        deepest: loops at which the damage is measured.
        damage: ``best`` minus the accuracy at ``deepest``.
    """

    best: float
    best_loops: int
    deepest: int
    damage: float


def overthinking_damage(grid: DepthGrid, trained_loops: int) -> list[Damage]:
    """Best accuracy minus that at 16 times the loops of training, for each difficulty of ``grid``.

    Measured at the deepest count of the grid that is no deeper than that; ``deepest`` says which.

    Args:
        grid: from ``depth_grid``.
        trained_loops: most loops seen in training, ``cfg.max_loop_iters`` of models trained here.
    """
    n = max(1, sum(count <= BEYOND * trained_loops for count in grid.loops))
    found = []
    for accuracy in grid.accuracy[:, :n]:
        best = float(accuracy.max())
        first = int((accuracy >= best - SAME).int().argmax())
        found.append(Damage(best, grid.loops[first], grid.loops[n - 1], best - float(accuracy[-1])))
    return found


def settle_rate(
    model: OpenMythos,
    task: Task,
    difficulty: int,
    loops: int,
    examples: int = 256,
    seed: int = 0,
    tolerance: float = 0.01,
) -> float:
    """Share of positions whose state hardly moves in the last loop: ``|h_t - h_{t-1}| < tolerance |h_t|``.

    Halting is off, since a position that has halted does not move either.

    Args:
        model: run in eval mode; put back after.
        task, difficulty, examples, seed: the problems, those of ``depth_grid``.
        loops: number of the loop that is looked at, at least 2.
        tolerance: relative to the state's norm.
    """
    if loops < 2:
        raise ValueError(f"loops={loops}; a change takes two loops, use at least 2")
    check_fit(model, task, [difficulty], examples)
    problems = task.batch(examples, difficulty, torch.Generator().manual_seed(seed))
    settled = positions = 0
    with measuring(model, halting=False):
        for part in chunks(problems, device_of(model)):
            valid = torch.ones_like(part.ids, dtype=torch.bool) if part.valid is None else part.valid.bool()
            for before, after in pairwise(readings(model, part.ids, [loops - 1, loops], part.valid)):
                moved = (after.state - before.state).float().norm(dim=-1)
                still = moved < tolerance * after.state.float().norm(dim=-1)
                settled += int((still & valid).sum())
                positions += int(valid.sum())
    return settled / positions


class FromStart(NamedTuple):
    """The model when started from some state.

    Attributes:
        accuracy: share of scored tokens that are right, mean over problems.
        differing: share of scored positions whose answer is not that from the model's own start.
    """

    accuracy: float
    differing: float


def initial_state_gap(
    model: OpenMythos, task: Task, difficulty: int, loops: int, examples: int = 256, seed: int = 0
) -> dict[str, FromStart]:
    """Whether the answer depends on where the loop starts (path independence, 2211.09961). Halting is off.

    Args:
        model: run in eval mode; put back after.
        task, difficulty, examples, seed: the problems, those of ``depth_grid``.
        loops: run from each start.

    Returns:
        For ``"own"`` (the model's first state), ``"zeros"`` and ``"noise"`` (standard normal).
    """
    check_fit(model, task, [difficulty], examples)
    generator = torch.Generator().manual_seed(seed)
    problems = task.batch(examples, difficulty, generator)

    def noise(e: Tensor, ctx: Context) -> Tensor:
        return ctx.mask.without_padding(torch.randn(e.shape, generator=generator).to(e))

    starts: dict[str, Callable[[Tensor, Context], Tensor]] = {
        "own": model.first_state,
        "zeros": lambda e, ctx: torch.zeros_like(e),
        "noise": noise,
    }
    accuracy, differing, scored = dict.fromkeys(starts, 0.0), dict.fromkeys(starts, 0), 0
    with measuring(model, halting=False):
        for part in chunks(problems, device_of(model)):
            asked, own = part.targets != UNSCORED, None
            scored += int(asked.sum())
            for name, start in starts.items():
                (reading,) = readings(model, part.ids, [loops], part.valid, start)
                answers = reading.logits.argmax(-1)
                own = answers if own is None else own
                accuracy[name] += float(task.score(answers, part.targets).tokens.sum()) / examples
                differing[name] += int((answers != own)[asked].sum())
    return {name: FromStart(accuracy[name], differing[name] / max(1, scored)) for name in starts}


# -- what halting saves


class HaltingGain(NamedTuple):
    """A fixed count against halting, on problems of mixed difficulty.

    Attributes:
        accuracy_fixed, accuracy_halting: share of scored tokens that are right, mean over problems.
        loops_fixed, loops_halting: loops that a position runs, mean over positions, padding left out.
        saved: share of the loops that halting leaves out.
    """

    accuracy_fixed: float
    accuracy_halting: float
    loops_fixed: float
    loops_halting: float
    saved: float


def enough_loops(model: OpenMythos, task: Task, difficulty: int, most: int, examples: int = 256, seed: int = 0) -> int:
    """Fewest loops, up to ``most``, at which accuracy is within .001 of the best. Halting is off.

    Args:
        model: run in eval mode; put back after.
        task, difficulty, examples, seed: the problems, those of ``depth_grid``.
        most: loops that are tried.
    """
    grid = depth_grid(model, task, [difficulty], range(1, most + 1), examples, seed, halting=False)
    return overthinking_damage(grid, most)[0].best_loops


def fixed_vs_halting(
    model: OpenMythos, task: Task, difficulties: Sequence[int], loops: int, examples: int = 256, seed: int = 0
) -> HaltingGain:
    """What halting saves, and what it costs, in batches that hold every one of ``difficulties``.

    Args:
        model: run in eval mode; put back after.
        task: draws and scores the problems.
        difficulties: problems take turns through them.
        loops: chosen for the hardest; the fixed count, and halting's limit.
        examples: problems in all.
        seed: of the problems.
    """
    check_fit(model, task, difficulties, examples)
    turns = [difficulties[i % len(difficulties)] for i in range(examples)]
    problems = task.mixed(turns, torch.Generator().manual_seed(seed))
    with measuring(model, halting=False):
        fixed = score_by_loops(model, task, problems, [loops])
    with measuring(model, halting=True):
        halting = score_by_loops(model, task, problems, [loops])
    used, ran = float(fixed.loops_used), float(halting.loops_used)
    return HaltingGain(float(fixed.tokens.mean()), float(halting.tokens.mean()), used, ran, 1 - ran / used)


class Point(NamedTuple):
    """Accuracy at some cost.

    Attributes:
        flops: floating-point operations a token.
        accuracy: share of scored tokens that are right, mean over problems.
        loops: that a position ran, mean over positions.
    """

    flops: float
    accuracy: float
    loops: float


class ComputeMatched(NamedTuple):
    """Accuracy against operations.

    Attributes:
        fixed: with halting off, a point for each loop count.
        halting: with halting on, for each ``act_threshold`` a point for each limit of loops.
    """

    fixed: list[Point]
    halting: dict[float, list[Point]]


def compute_matched(
    model: OpenMythos,
    task: Task,
    difficulty: int,
    loops: Sequence[int],
    examples: int = 256,
    seed: int = 0,
    thresholds: Sequence[float] = THRESHOLDS,
) -> ComputeMatched:
    """Accuracy at equal operations, halting on and off; :func:`accuracy_at` reads one curve at another's cost.

    Args:
        model: run in eval mode; put back after.
        task, difficulty, examples, seed: the problems, those of ``depth_grid``.
        loops: the fixed counts, and halting's limits.
        thresholds: values of ``cfg.act_threshold`` to try.
    """

    def curve(halting: bool, threshold: float) -> list[Point]:
        with measuring(model, act_threshold=threshold):
            grid = depth_grid(model, task, [difficulty], loops, examples, seed, halting)
        return cost_curve(grid, model.cfg, task.length(difficulty))

    fixed = curve(False, model.cfg.act_threshold)
    return ComputeMatched(fixed, {threshold: curve(True, threshold) for threshold in thresholds})


def cost_curve(grid: DepthGrid, cfg: MythosConfig, length: int) -> list[Point]:
    """The first row of ``grid`` against the operations of its mean loops, for problems of ``length`` tokens."""
    context = (length + 1) // 2  # what a token sees, on average
    rows = zip(grid.accuracy[0].tolist(), grid.loops_used[0].tolist(), strict=True)
    return [Point(flops_per_token(cfg, used, context), accuracy, used) for accuracy, used in rows]


def accuracy_at(curve: Sequence[Point], flops: float) -> float:
    """Accuracy at a cost between the points of ``curve``, on the line that joins them; flat beyond its ends."""
    rising = sorted(curve)
    return float(np.interp(flops, [point.flops for point in rising], [point.accuracy for point in rising]))
