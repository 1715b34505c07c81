"""The full evaluation of a model on a task, and its file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from open_mythos import files
from open_mythos.arguments import checked
from open_mythos.evaluation import metrics as measures
from open_mythos.evaluation.depth import measuring
from open_mythos.evaluation.grid import DepthGrid, combine, depth_grid
from open_mythos.fields import must
from open_mythos.model import OpenMythos
from open_mythos.nn.exits import Exit, Gate, spell
from open_mythos.tasks.base import Task

FILE = "evaluation.json"
_POINT = {"loops": float, "flops": float, "accuracy": float, "fixed_accuracy": float}
_SAVED = {
    "exit?": str, "saved": float, "accuracy_fixed": float, "accuracy_halting": float, "loops_fixed?": float,
    "loops_halting?": float,
}  # fmt: skip
_COST = {"difficulty": int, "all_loops": float, "accuracy": float, "lost": float, "loops_used": float}
_MATCHED = {"difficulty": int, "halting": {"*": [_POINT]}}
_SHAPE = {
    "grids": [dict],
    "kinds?": [dict],
    "metrics": {
        "exit?": ([_COST], type(None)), "halting?": (_SAVED, type(None)), "compute_matched?": (_MATCHED, type(None)),
    },
}  # fmt: skip
MAX_METRIC_TOKENS = 4096
"""Limits the problems of each metric, as every metric takes extra runs."""


@dataclass(eq=False)
class Evaluation:
    """Result of :func:`evaluate`.

    Attributes:
        grids: one per seed of the problems.
        metrics: plain values. ``"difficulties"``: for each difficulty, with every position running all loops,
            overthinking damage, with the 95% interval and the exact share at its best loops, share of converged states
            (``"settle_rate"``) and sensitivity to the initial state. ``"exit"``: for each difficulty, the accuracy that
            the grids' exit loses at their maximum loops, against all loops on the same problems; None without an exit.
            ``"halting"`` and ``"compute_matched"``: from ``fixed_vs_halting``, with that exit or the gate, and
            ``compute_matched`` of :mod:`open_mythos.evaluation.metrics`; None without halting.
        kinds: for a task made of several, a grid of each of them, for the first seed.
    """

    grids: list[DepthGrid]
    metrics: dict[str, Any]
    kinds: list[DepthGrid] = field(default_factory=list)

    def exit_in_words(self) -> str:
        """The exit of the grids, and its greatest loss of accuracy against running all loops, as text."""
        grid, costs = self.grids[0], self.metrics.get("exit")
        if grid.exit is None or costs is None:
            return "every position runs all loops" if grid.exit is None else f"with the exit {grid.exit}"
        worst = max(costs, key=lambda cost: cost["lost"])
        lost = f"loses up to {worst['lost']:.3f} of accuracy" if worst["lost"] >= 0.0005 else "loses nothing"
        return f"the exit {grid.exit} {lost} ({worst['difficulty']} {grid.unit}, {grid.loops[-1]} loops)"

    def to_dict(self) -> dict[str, Any]:
        """Plain values; ``"combined"`` aggregates the grids."""
        combined = {
            name: {key: value.tolist() for key, value in spread._asdict().items()}
            for name, spread in combine(self.grids).items()
        }
        kinds = {"kinds": [grid.to_dict() for grid in self.kinds]} if self.kinds else {}
        grids = [grid.to_dict() for grid in self.grids]
        return {"grids": grids, "combined": combined, "metrics": self.metrics, **kinds}

    @classmethod
    def from_dict(cls, data: dict[str, Any], name: str = "the evaluation") -> Self:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: naming the invalid field of ``name``, and what was expected.
        """
        files.shaped(data, _SHAPE, name)
        must(len(data["grids"]) > 0, f"{name}: grids is empty; measure again")
        grids, kinds = (
            [DepthGrid.from_dict(grid, f"{name}: {key}[{i}]") for i, grid in enumerate(data.get(key, []))]
            for key in ("grids", "kinds")
        )
        return cls(grids, data["metrics"], kinds)

    def save(self, directory: str | Path) -> Path:
        """Write ``evaluation.json`` into ``directory``, created if missing, and return its path."""
        path = Path(directory) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, self.to_dict())
        return path

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: naming the file, if its content is no evaluation.
        """
        path = Path(directory) / FILE
        return cls.from_dict(files.read_json(path), str(path))


@checked
def evaluate(
    model: OpenMythos, task: Task, difficulties: Sequence[int], loops: Sequence[int], examples: int = 256,
    seeds: Sequence[int] = (0,), exit: Exit | None = None, progress: Callable[[str], None] | None = None,
) -> Evaluation:  # fmt: skip
    """Compute the depth grid for each seed of the problems, and the metrics for the first seed.

    Arguments and errors are those of :func:`~open_mythos.evaluation.grid.depth_grid`; ``progress`` is called at most
    :func:`n_steps` times. In the grids every position runs all loops unless there is an ``exit``. The metrics of depth
    are always measured without it, on the same problems; the savings of the exit, or else of the gate, are a metric.
    """
    must(len(seeds) > 0, "seeds is empty; give at least one")
    for name, values in ("seeds", seeds), ("difficulties", difficulties):
        must(len({*values}) == len(values), f"{name} {', '.join(map(str, values))}: give each value only once")
    begin = progress or (lambda stage: None)

    def measured(rule: Exit | None) -> list[DepthGrid]:
        return [depth_grid(model, task, difficulties, loops, examples, seed, False, begin, rule) for seed in seeds]

    full = measured(None)
    grids = full if exit is None else measured(exit)
    seed, deepest = seeds[0], full[0].loops[-1]

    def n_problems(difficulty: int) -> int:
        return max(1, min(examples, MAX_METRIC_TOKENS // task.length(difficulty)))

    metrics: dict[str, Any] = {"trained_loops": model.cfg.max_loop_iters, "difficulties": []}
    metrics["exit"] = None if exit is None else _costs(full, grids)
    damages = measures.overthinking_damage(full[0], model.cfg.max_loop_iters)
    for row, (difficulty, damage) in enumerate(zip(difficulties, damages, strict=True)):
        at_best = row, full[0].loops.index(damage.best_loops)
        begin(f"convergence at {difficulty} {task.unit}")
        n = n_problems(difficulty)
        starts = measures.initial_state_gap(model, task, difficulty, deepest, n, seed)
        metrics["difficulties"].append({
            "difficulty": difficulty,
            **damage._asdict(),
            **{name: float(getattr(full[0], name)[at_best]) for name in ("low", "high", "exact")},
            "settle_rate": measures.settle_rate(model, task, difficulty, deepest, n, seed) if deepest > 1 else None,
            "from_start": {name: result._asdict() for name, result in starts.items()},
        })  # fmt: skip
    metrics["halting"] = metrics["compute_matched"] = None
    with measuring(model):
        rule = model.recurrent.choose_exit(exit)
    if rule is not None:
        hardest = max(difficulties)
        n = n_problems(hardest)
        begin(f"loops needed at {hardest} {task.unit}")
        max_loops = damages[list(difficulties).index(hardest)].best_loops
        n_loops = measures.enough_loops(model, task, hardest, max_loops, n, seed)
        begin("fixed depth against halting")
        gain = measures.fixed_vs_halting(model, task, difficulties, n_loops, examples, seed, rule)
        metrics["halting"] = {"exit": spell(rule), "difficulties": list(difficulties), **gain._asdict()}
    if model.cfg.halting and isinstance(rule, Gate):
        begin("accuracy at matched FLOPs")
        fixed, halting = measures.compute_matched(model, task, hardest, loops, n, seed)
        metrics["compute_matched"] = {
            "difficulty": hardest,
            "fixed": [point._asdict() for point in fixed],
            "halting": {
                str(threshold): [{**p._asdict(), "fixed_accuracy": measures.accuracy_at(fixed, p.flops)} for p in curve]
                for threshold, curve in halting.items()
            },
        }
    kinds = [
        depth_grid(model, part, levels, loops, examples, seed, False, None, exit)
        for part, levels in task.by_kind(difficulties)
    ]
    return Evaluation(grids, metrics, kinds)


def _costs(full: Sequence[DepthGrid], grids: Sequence[DepthGrid]) -> list[dict[str, float]]:
    """Accuracy with all loops and with the exit, for each difficulty at the maximum loops; means over seeds."""
    found = []
    for row, difficulty in enumerate(full[0].difficulties):
        fixed, left = (sum(float(g.accuracy[row, -1]) for g in some) / len(some) for some in (full, grids))
        used = sum(float(grid.loops_used[row, -1]) for grid in grids) / len(grids)
        found.append(dict(difficulty=difficulty, all_loops=fixed, accuracy=left, lost=fixed - left, loops_used=used))
    return found


def n_steps(difficulties: Sequence[int], seeds: Sequence[int], exit: Exit | None = None) -> int:
    """Maximum number of ``progress`` calls of :func:`evaluate`."""
    return ((1 if exit is None else 2) * len(seeds) + 1) * len(difficulties) + 3
