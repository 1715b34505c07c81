"""Compares a looped model with two baselines trained on the same data and steps: accuracy, FLOPs, parameters."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_mythos import files, tasks
from open_mythos.diagnostics import flops_per_token
from open_mythos.evaluation.grid import student_interval
from open_mythos.evaluation.summary import Evaluation
from open_mythos.training import baselines, runs
from open_mythos.training.config import TrainConfig
from open_mythos.training.cost import flops_per_step
from open_mythos.training.fit import Watch, fit, load_evaluation

KINDS = ("looped", "single", "unrolled")
RESULTS = "compare.json"
MIN_DIFFERENCE = 0.005
"""Smaller differences of means, in accuracy or bits, count as a tie."""


@dataclass
class Contender:
    """One kind of model. Lists are over difficulties, then loops; a baseline has one loop count.

    ``flops_per_token`` is at the problems' mean context and the mean loops run; ``mean``, ``worst``, and the 95%
    interval ``low`` to ``high`` are over seeds.
    """

    kind: str
    loops: list[int]
    parameters: int
    training_flops: float
    flops_per_token: list[list[float]]
    mean: list[list[float]]
    worst: list[list[float]]
    low: list[list[float]]
    high: list[list[float]]

    def at(self, column: int) -> "Entry":
        """Its entry at one of ``loops``."""
        n = self.loops[column]
        name = f"looped, {n} loops" if self.kind == "looped" else self.kind
        flops, mean, worst = ([row[column] for row in rows] for rows in (self.flops_per_token, self.mean, self.worst))
        return Entry(name, self.kind, n, self.parameters, self.training_flops, flops, mean, worst)


@dataclass
class Entry:
    """A contender at one number of loops: a row of the table. Lists are over difficulties."""

    name: str
    kind: str
    loops: int
    parameters: int
    training_flops: float
    flops_per_token: list[float]
    mean: list[float]
    worst: list[float]


@dataclass
class Comparison:
    """Result of :func:`compare`.

    Attributes:
        recipe, unit, difficulties, trained_difficulty, trained_loops, seeds: of the runs.
        measure: "accuracy" (higher is better), or "bits per byte" of text (lower is better).
        contenders: in the order of ``KINDS``.
    """

    recipe: str
    unit: str
    measure: str
    difficulties: list[int]
    trained_difficulty: int
    trained_loops: int
    seeds: list[int]
    contenders: list[Contender]

    def entries(self) -> list[Entry]:
        """The looped model at its maximum depth and at that of the unrolled one, then the baselines."""
        looped, *baselines = self.contenders
        columns = sorted({looped.loops.index(self.trained_loops), len(looped.loops) - 1}, reverse=True)
        return [looped.at(column) for column in columns] + [baseline.at(0) for baseline in baselines]

    def verdicts(self) -> list[str]:
        """For each difficulty, the best model: at maximum depth, and at matched FLOPs."""
        entries = self.entries()
        deepest, matched = entries[0], next(e for e in entries if e.loops == self.trained_loops)
        baselines = [entry for entry in entries if entry.kind != "looped"]
        lines = []
        for row, difficulty in enumerate(self.difficulties):
            line = f"{difficulty} {self.unit}: {self._verdict(row, [deepest, *baselines])}"
            if matched is not deepest:
                line += f" With as many operations as the unrolled model: {self._verdict(row, [matched, *baselines])}"
            lines.append(line)
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with entries and verdicts."""
        entries = [dataclasses.asdict(entry) for entry in self.entries()]
        return dataclasses.asdict(self) | {"entries": entries, "verdicts": self.verdicts()}

    def curves(self, difficulty: int) -> dict[str, dict[int, float]]:
        """``{kind: {loops: mean}}`` at one difficulty; a baseline is a single point."""
        row = self.difficulties.index(difficulty)
        return {model.kind: dict(zip(model.loops, model.mean[row], strict=True)) for model in self.contenders}

    def show(self, value: float) -> str:
        """``value`` as text."""
        return f"{value:.1%}" if self.measure == "accuracy" else f"{value:.4f}"

    def _verdict(self, row: int, entries: list[Entry]) -> str:
        sign = 1 if self.measure == "accuracy" else -1
        best, *rest = sorted(entries, key=lambda entry: -sign * entry.mean[row])
        value, *values = (f"{entry.name} {self.show(entry.mean[row])}" for entry in (best, *rest))
        n_ties = sum(sign * (best.mean[row] - entry.mean[row]) <= MIN_DIFFERENCE for entry in rest)
        if n_ties:
            return f"no real difference between {value} and {', '.join(values[:n_ties])}."
        in_all_seeds = sign * (best.worst[row] - rest[0].mean[row]) > 0
        return f"{value} is ahead of {values[0]}{'' if in_all_seeds else ' on average, but not in its worst seed'}."


def load(path: Path) -> dict[str, Any]:
    """What :func:`compare` wrote, as it stands in the file; ValueError, naming file and field, for anything else."""
    row = {"name": str, "parameters": int, "training_flops": float, "flops_per_token": [float], "mean": [float]}
    one = {"kind": str, "loops": [int], "mean": [[float]], "low": [[float]], "high": [[float]]}
    return files.read_json(path, {
        "recipe": str, "unit": str, "measure": str, "difficulties": [int], "trained_loops": int, "seeds": [int],
        "contenders": [one], "entries": [row | {"worst": [float]}], "verdicts": [str],
    })  # fmt: skip


def compare(
    cfg: TrainConfig,
    out: Path,
    seeds: Sequence[int] = (0, 1, 2),
    watching: Callable[[TrainConfig], AbstractContextManager[Watch]] = lambda cfg: nullcontext(Watch()),
) -> Comparison:
    """Train and evaluate ``cfg``'s model and both baselines for every seed, and write ``out/compare.json``.

    All three see the same problems in the same order. Runs are ``out/KIND-seedN``; finished ones are reused,
    interrupted ones resumed.

    Args:
        cfg, out: of the looped model, ``kind`` and ``seed`` are set here; directory, created if missing.
        seeds: of weights and data.
        watching: makes the :class:`~open_mythos.training.fit.Watch` of a run.

    Raises:
        ValueError: without a seed, or if ``out`` holds runs with other settings.
    """
    if not seeds:
        raise ValueError("no seeds to compare over; give at least one")
    loops = sorted({*cfg.evaluation.loops, cfg.loops.maximum})
    cfg = dataclasses.replace(cfg, evaluation=dataclasses.replace(cfg.evaluation, loops=loops))
    for seed in seeds:
        for kind in KINDS:
            run_cfg, run = dataclasses.replace(cfg, kind=kind, seed=seed), out / f"{kind}-seed{seed}"
            if (run / runs.EVALUATION).is_file() and TrainConfig.load(run / runs.RUN_CONFIG) == run_cfg:
                continue
            with watching(run_cfg) as watch:
                watch.log(f"{kind} model, seed {seed}: {run}")
                fit(run_cfg, run, "auto" if (run / runs.RUN_CONFIG).exists() else "never", watch)
    task, contenders = tasks.load(cfg.task.name, **cfg.task.options), []
    for kind in KINDS:
        scores = [load_evaluation(out / f"{kind}-seed{seed}") for seed in seeds]
        contenders.append(_contender(dataclasses.replace(cfg, kind=kind), task, scores))
    measure = "accuracy" if isinstance(scores[0], Evaluation) else "bits per byte"
    # Of text, only the first difficulty is evaluated
    difficulties, trained = cfg.evaluation.difficulties[: len(contenders[0].mean)], cfg.task.max_difficulty
    comparison = Comparison(
        cfg.recipe, task.unit, measure, difficulties, trained, cfg.loops.maximum, list(seeds), contenders
    )
    files.write_json(out / RESULTS, comparison.to_dict())
    return comparison


def _contender(cfg: TrainConfig, task: tasks.Task, scores: list[Evaluation | dict[int, float]]) -> Contender:
    loops, values, used = _values(scores)
    low, high = student_interval(values)
    worst = values.amin(-1) if isinstance(scores[0], Evaluation) else values.amax(-1)
    flops = []
    for difficulty, row in zip(cfg.evaluation.difficulties, used.tolist(), strict=False):
        context = (task.length(difficulty) + 1) // 2  # mean over the tokens
        flops.append([flops_per_token(cfg.model, n, context) for n in row])
    with torch.device("meta"):
        parameters = sum(p.numel() for p in baselines.build(cfg).parameters())
    return Contender(
        cfg.kind, loops, parameters, cfg.steps * flops_per_step(cfg), flops,
        *(x.tolist() for x in (values.mean(-1), worst, low, high)),
    )  # fmt: skip


def _values(scores: list[Evaluation | dict[int, float]]) -> tuple[list[int], Tensor, Tensor]:
    """Loops (L), accuracy or bits (D, L, seeds), and mean loops run by a position (D, L)."""
    grids = [score.grids[0] for score in scores if isinstance(score, Evaluation)]
    if grids:
        used = torch.stack([grid.loops_used for grid in grids]).mean(0)
        return grids[0].loops, torch.stack([grid.accuracy for grid in grids], -1), used
    bits = [score for score in scores if not isinstance(score, Evaluation)]
    values = torch.tensor([list(curve.values()) for curve in bits], dtype=torch.float64)
    loops = list(bits[0])
    return loops, values.T[None], torch.tensor([loops], dtype=torch.float64)
