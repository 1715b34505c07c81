"""A looped model beside two that do not loop, of the same data and steps: who wins where, and at what cost."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_mythos import tasks
from open_mythos.diagnostics import flops_per_token
from open_mythos.evaluation.intervals import student_interval
from open_mythos.evaluation.summary import Evaluation
from open_mythos.training import baselines, runs
from open_mythos.training.config import TrainConfig
from open_mythos.training.cost import flops_per_step
from open_mythos.training.fit import Watch, fit, load_evaluation

KINDS = ("looped", "single", "unrolled")
RESULTS = "compare.json"
ALIKE = 0.005
"""Difference of means, in accuracy or in bits, below which nobody is called better."""


@dataclass
class Contender:
    """One kind of model over all seeds. Lists are over difficulties, then loops.

    Attributes:
        kind: of :class:`TrainConfig`.
        loops: at which it was measured; a baseline has one count.
        parameters: of the model.
        training_flops: of the whole run.
        flops_per_token: to answer, at problems' mean context; less than ``loops`` cost where positions halt.
        mean, worst: over seeds.
        low, high: 95% interval of the mean over seeds.
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


@dataclass
class Entry:
    """A contender at one number of loops: a line of the table. Lists are over difficulties."""

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
    """What :func:`compare` found.

    Attributes:
        recipe, unit, difficulties, trained_difficulty, trained_loops, seeds: of the runs.
        measure: "accuracy", or "bits per byte" of text, of which fewer are better.
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
        """Each baseline, and the looped model twice: at its deepest, and as deep as the unrolled one."""
        looped, *others = self.contenders
        columns = sorted({looped.loops.index(self.trained_loops), len(looped.loops) - 1}, reverse=True)
        return [_entry(looped, column) for column in columns] + [_entry(other, 0) for other in others]

    def verdicts(self) -> list[str]:
        """For each difficulty, who is ahead: with all the loops measured, and with no more operations than others."""
        entries = self.entries()
        deepest, as_deep = entries[0], next(e for e in entries if e.loops == self.trained_loops)
        others = [entry for entry in entries if entry.kind != "looped"]
        said = []
        for row, difficulty in enumerate(self.difficulties):
            line = f"{difficulty} {self.unit}: {self._verdict(row, [deepest, *others])}"
            if as_deep is not deepest:
                line += f" With as many operations as the unrolled model: {self._verdict(row, [as_deep, *others])}"
            said.append(line)
        return said

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, entries and verdicts too."""
        entries = [dataclasses.asdict(entry) for entry in self.entries()]
        return dataclasses.asdict(self) | {"entries": entries, "verdicts": self.verdicts()}

    def curves(self, difficulty: int) -> dict[str, dict[int, float]]:
        """``{kind: {loops: mean}}`` at one difficulty; a baseline is a single point."""
        row = self.difficulties.index(difficulty)
        return {of.kind: dict(zip(of.loops, of.mean[row], strict=True)) for of in self.contenders}

    def show(self, value: float) -> str:
        """A value as people read it."""
        return f"{value:.1%}" if self.measure == "accuracy" else f"{value:.4f}"

    def _verdict(self, row: int, entries: list[Entry]) -> str:
        sign = 1 if self.measure == "accuracy" else -1
        first, *rest = sorted(entries, key=lambda entry: -sign * entry.mean[row])
        value = f"{first.name} {self.show(first.mean[row])}"
        alike = [entry for entry in rest if sign * (first.mean[row] - entry.mean[row]) <= ALIKE]
        if alike:
            same = ", ".join(f"{entry.name} {self.show(entry.mean[row])}" for entry in alike)
            return f"no real difference between {value} and {same}."
        sure = sign * (first.worst[row] - rest[0].mean[row]) > 0
        return (
            f"{value} is ahead of {rest[0].name} {self.show(rest[0].mean[row])}"
            f"{'' if sure else ' on average, but not in its worst seed'}."
        )


def _entry(of: Contender, column: int) -> Entry:
    n = of.loops[column]
    name = of.kind if of.kind != "looped" else f"looped, {n} loops"
    flops, mean, worst = ([row[column] for row in values] for values in (of.flops_per_token, of.mean, of.worst))
    return Entry(name, of.kind, n, of.parameters, of.training_flops, flops, mean, worst)


def compare(
    cfg: TrainConfig,
    out: Path,
    seeds: Sequence[int] = (0, 1, 2),
    watching: Callable[[int], AbstractContextManager[Watch]] = lambda steps: nullcontext(Watch()),
) -> Comparison:
    """Train and measure ``cfg``'s model and both baselines, for every seed, and write ``out/compare.json``.

    The same problems in the same order for all three. Runs are ``out/KIND-seedN``; one that has ended is not run
    again, one that was stopped goes on.

    Args:
        cfg: of the looped model; ``kind`` and ``seed`` are set here.
        out: directory, made if need be.
        seeds: of weights and data.
        watching: from the number of steps of a run to where it reports.

    Raises:
        ValueError: without a seed, or if ``out`` holds runs of other settings.
    """
    if not seeds:
        raise ValueError("no seeds to compare over; give at least one")
    loops = sorted({*cfg.evaluation.loops, cfg.loops.maximum})
    cfg = dataclasses.replace(cfg, evaluation=dataclasses.replace(cfg.evaluation, loops=loops))
    for seed in seeds:
        for kind in KINDS:
            own, run = dataclasses.replace(cfg, kind=kind, seed=seed), out / f"{kind}-seed{seed}"
            if _has_ended(own, run):
                continue
            with watching(cfg.steps) as watch:
                watch.say(f"{kind} model, seed {seed}: {run}")
                fit(own, run, "auto" if (run / runs.RUN_CONFIG).exists() else "never", watch)
    found = _collect(cfg, out, list(seeds))
    (out / RESULTS).write_text(json.dumps(found.to_dict(), indent=1) + "\n")
    return found


def _has_ended(cfg: TrainConfig, run: Path) -> bool:
    return (run / runs.EVALUATION).is_file() and TrainConfig.load(run / runs.RUN_CONFIG) == cfg


def _collect(cfg: TrainConfig, out: Path, seeds: list[int]) -> Comparison:
    task, contenders = tasks.load(cfg.task.name, **cfg.task.options), []
    for kind in KINDS:
        measured = [load_evaluation(out / f"{kind}-seed{seed}") for seed in seeds]
        contenders.append(_contender(dataclasses.replace(cfg, kind=kind), task, measured))
    measure = "accuracy" if isinstance(measured[0], Evaluation) else "bits per byte"
    difficulties = cfg.evaluation.difficulties[: len(contenders[0].mean)]  # of text, the first alone is measured
    return Comparison(
        cfg.recipe, task.unit, measure, difficulties, cfg.task.max_difficulty, cfg.loops.maximum, seeds, contenders
    )


def _contender(cfg: TrainConfig, task: tasks.Task, measured: list[Evaluation | dict[int, float]]) -> Contender:
    loops, values, used = _values(measured)
    low, high = student_interval(values)
    worst = values.amin(-1) if isinstance(measured[0], Evaluation) else values.amax(-1)
    flops = []
    for difficulty, row in zip(cfg.evaluation.difficulties, used.tolist(), strict=False):
        context = (task.length(difficulty) + 1) // 2  # what a token sees, on average
        flops.append([flops_per_token(cfg.model, n, context) for n in row])
    with torch.device("meta"):
        parameters = sum(p.numel() for p in baselines.build(cfg).parameters())
    return Contender(
        cfg.kind, loops, parameters, cfg.steps * flops_per_step(cfg), flops,
        *(x.tolist() for x in (values.mean(-1), worst, low, high)),
    )  # fmt: skip


def _values(measured: list[Evaluation | dict[int, float]]) -> tuple[list[int], Tensor, Tensor]:
    """Loops (L), values (D, L, seeds), and loops that a position really ran (D, L), mean over seeds."""
    grids = [found.grids[0] for found in measured if isinstance(found, Evaluation)]
    if grids:
        used = torch.stack([grid.loops_used for grid in grids]).mean(0)
        return grids[0].loops, torch.stack([grid.accuracy for grid in grids], -1), used
    bits = [found for found in measured if not isinstance(found, Evaluation)]
    values = torch.tensor([list(curve.values()) for curve in bits], dtype=torch.float64)
    loops = list(bits[0])
    return loops, values.T[None], torch.tensor([loops], dtype=torch.float64)
