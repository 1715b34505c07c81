"""All that is measured of a reasoner, and the file that keeps it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from open_mythos.evaluation.grid import DepthGrid, combine, depth_grid
from open_mythos.evaluation.metrics import (
    accuracy_at,
    compute_matched,
    enough_loops,
    fixed_vs_halting,
    initial_state_gap,
    overthinking_damage,
    settle_rate,
)
from open_mythos.model import OpenMythos
from open_mythos.nn.exits import Exit
from open_mythos.tasks.base import Task

FILE = "evaluation.json"
METRIC_TOKENS = 4096
"""As many problems as have so many tokens together are what a metric is measured on: each takes runs of its own."""


@dataclass(eq=False)
class Evaluation:
    """What :func:`evaluate` found.

    Attributes:
        grids: one for each seed of the problems.
        metrics: plain values. ``"difficulties"``: for each difficulty a dictionary of its damage by overthinking,
            settle rate and gap between initial states. ``"halting"`` and ``"compute_matched"``: see the functions of
            these names in :mod:`open_mythos.evaluation.metrics`; None for a model that does not halt.
    """

    grids: list[DepthGrid]
    metrics: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values; ``"combined"`` holds what the grids say together."""
        combined = {name: spread.to_dict() for name, spread in combine(self.grids).items()}
        return {"grids": [grid.to_dict() for grid in self.grids], "combined": combined, "metrics": self.metrics}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: if something is missing.
        """
        if missing := {"grids", "metrics"} - data.keys():
            raise ValueError(f"not an evaluation: it lacks {', '.join(sorted(missing))}; measure again")
        return cls([DepthGrid.from_dict(grid) for grid in data["grids"]], data["metrics"])

    def save(self, directory: str | Path) -> Path:
        """Write ``evaluation.json`` into ``directory``, made if need be, and say where it is."""
        path = Path(directory) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        return path

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: if nothing did.
            ValueError: naming the file, if it holds something else.
        """
        path = Path(directory) / FILE
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: {error}") from error


def evaluate(
    model: OpenMythos,
    task: Task,
    difficulties: Sequence[int],
    loops: Sequence[int],
    examples: int = 256,
    seeds: Sequence[int] = (0,),
    exit: Exit | None = None,
    progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Measure the depth grid for each seed of the problems, and the metrics on those of the first.

    Arguments and errors are those of :func:`~open_mythos.evaluation.grid.depth_grid`; ``progress`` is called
    :func:`n_steps` times or less. The grid shows what depth does, so every position runs all loops unless an ``exit``
    says otherwise; what the gate saves is measured in any case, if the model halts.
    """
    begin = progress or (lambda what: None)
    grids = [depth_grid(model, task, difficulties, loops, examples, seed, False, begin, exit) for seed in seeds]
    seed, deepest = seeds[0], grids[0].loops[-1]

    def few(difficulty: int) -> int:
        return max(1, min(examples, METRIC_TOKENS // task.length(difficulty)))

    found: dict[str, Any] = {"trained_loops": model.cfg.max_loop_iters, "difficulties": []}
    damages = overthinking_damage(grids[0], model.cfg.max_loop_iters)
    for difficulty, damage in zip(difficulties, damages, strict=True):
        begin(f"does it settle: {difficulty} {task.unit}")
        n = few(difficulty)
        starts = initial_state_gap(model, task, difficulty, deepest, n, seed)
        found["difficulties"].append({
            "difficulty": difficulty,
            **damage._asdict(),
            "settle_rate": settle_rate(model, task, difficulty, deepest, n, seed) if deepest > 1 else None,
            "from_start": {name: result._asdict() for name, result in starts.items()},
        })  # fmt: skip
    found["halting"] = found["compute_matched"] = None
    if model.cfg.halting:
        hardest = max(difficulties)
        begin("loops that the hardest needs")
        most = damages[list(difficulties).index(hardest)].best_loops
        enough = enough_loops(model, task, hardest, most, few(hardest), seed)
        begin("fixed against halting")
        gain = fixed_vs_halting(model, task, difficulties, enough, examples, seed)
        found["halting"] = {"difficulties": list(difficulties), **gain._asdict()}
        begin("accuracy at equal operations")
        found["compute_matched"] = _compute_matched(model, task, hardest, loops, few(hardest), seed)
    return Evaluation(grids, found)


def n_steps(difficulties: Sequence[int], seeds: Sequence[int]) -> int:
    """How often :func:`evaluate` says what it begins, at most."""
    return (len(seeds) + 1) * len(difficulties) + 3


def _compute_matched(
    model: OpenMythos, task: Task, difficulty: int, loops: Sequence[int], examples: int, seed: int
) -> dict[str, Any]:
    """As plain values, each point with halting on beside the accuracy of a fixed count at the same operations."""
    fixed, halting = compute_matched(model, task, difficulty, loops, examples, seed)
    return {
        "difficulty": difficulty,
        "fixed": [point._asdict() for point in fixed],
        "halting": {
            str(threshold): [
                {**point._asdict(), "fixed_accuracy": accuracy_at(fixed, point.flops)} for point in curve
            ]
            for threshold, curve in halting.items()
        },
    }  # fmt: skip
