"""Comparison of a looped model with four baselines, trained on the same data and steps: accuracy, FLOPs, parameters."""

import dataclasses
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_mythos import files, tasks
from open_mythos.diagnostics import flops_per_token
from open_mythos.evaluation.gap import OverSeeds, gap_closed, loop_exponent, over_seeds
from open_mythos.evaluation.grid import student_interval
from open_mythos.evaluation.summary import Evaluation
from open_mythos.evaluation.token_kinds import KINDS as TOKEN_KINDS
from open_mythos.training import baselines
from open_mythos.training.config import TrainConfig
from open_mythos.training.cost import flops_per_step
from open_mythos.training.fit import Watch, load_evaluation, load_kinds
from open_mythos.training.plan import KINDS, Plan, Watching

RESULTS = "compare.json"
MIN_DIFFERENCE = 0.005
"""Smaller differences of means, in accuracy or bits, count as a tie."""


@dataclass
class Contender:
    """The results of one kind of model. Lists are over difficulties, then loops; a baseline has one loop count.

    ``flops_per_token`` is at the problems' mean context and the mean loops run; ``mean``, ``worst``, and the 95%
    interval ``low`` to ``high`` are over seeds. ``lr`` is its learning rate; ``tried`` the result of each rate on the
    first seed. For text, ``by_token`` has bits per byte of each kind of token, at ``trained_loops``, mean over seeds.
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
    lr: float = 0.0
    tried: dict[str, float] = field(default_factory=dict)
    by_token: dict[str, float] = field(default_factory=dict)

    def at(self, column: int) -> "Entry":
        """Its entry at one of ``loops``."""
        n = self.loops[column]
        name = f"looped, {n} loops" if self.kind == "looped" else self.kind
        flops, mean, worst = ([row[column] for row in rows] for rows in (self.flops_per_token, self.mean, self.worst))
        return Entry(name, self.kind, n, self.parameters, self.training_flops, flops, mean, worst, self.lr)


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
    lr: float


@dataclass
class Comparison:
    """Result of :func:`compare`.

    Attributes:
        recipe, unit, difficulties, trained_difficulty, trained_loops, seeds: of the runs.
        measure: "accuracy" (higher is better), or "bits per byte" of text (lower is better).
        contenders: in the order of ``KINDS``.
        closed, exponent: for each difficulty, :func:`~open_mythos.evaluation.gap.gap_closed` and, for text,
            :func:`~open_mythos.evaluation.gap.loop_exponent` over seeds, at ``trained_loops``; None where it is defined
            for no seed. A gap of no more than ``MIN_DIFFERENCE`` counts as none.
    """

    recipe: str
    unit: str
    measure: str
    difficulties: list[int]
    trained_difficulty: int
    trained_loops: int
    seeds: list[int]
    contenders: list[Contender]
    closed: list[OverSeeds | None] = field(default_factory=list)
    exponent: list[OverSeeds | None] = field(default_factory=list)

    def entries(self) -> list[Entry]:
        """The looped model at its maximum depth and at the unrolled baseline's depth, then the baselines."""
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

    def worth(self) -> list[str]:
        """For each difficulty, how much of the gap from single to unrolled the loop closes, and its exponent."""

        def said(found: OverSeeds, form: str) -> str:
            mean, worst, *ends = (
                format(x, form) for x in (found.mean, found.worst, found.low, found.high) if x is not None
            )
            interval = f", 95% interval {ends[0]} to {ends[1]}" if ends else ""
            few = f", {found.seeds} of {len(self.seeds)} seeds have a gap" if found.seeds < len(self.seeds) else ""
            return f"{mean} (worst {worst}{interval}{few})"

        lines = []
        for row, (closed, phi) in enumerate(zip(self.closed, self.exponent, strict=True)):
            line = f"{self.difficulties[row]} {self.unit}: no gap: unrolled is not better than single."
            if closed:
                line = (
                    f"{self.difficulties[row]} {self.unit}: of the gap from single to unrolled, {self.trained_loops} "
                )
                line += f"loops close {said(closed, '.0%')}"
                line += f"; φ {said(phi, '.2f')}." if phi else "."
            lines.append(line)
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with entries, verdicts and worth."""
        entries = [dataclasses.asdict(entry) for entry in self.entries()]
        return dataclasses.asdict(self) | {"entries": entries, "verdicts": self.verdicts(), "worth": self.worth()}

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
    """Read the file that :func:`compare` wrote; ValueError, naming file and field, for anything else."""
    row = {"name": str, "parameters": int, "training_flops": float, "flops_per_token": [float], "mean": [float]}
    row |= {"worst": [float], "lr?": float}
    one = {"kind": str, "loops": [int], "mean": [[float]], "low": [[float]], "high": [[float]]}
    one |= {"by_token?": {"*": float}}
    return files.read_json(path, {
        "recipe": str, "unit": str, "measure": str, "difficulties": [int], "trained_loops": int, "seeds": [int],
        "contenders": [one], "entries": [row], "verdicts": [str], "worth?": [str],
    })  # fmt: skip


def compare(
    cfg: TrainConfig,
    out: Path,
    seeds: Sequence[int] = (0, 1, 2),
    watching: Watching = lambda cfg: nullcontext(Watch()),
    rates: Sequence[float] = (),
) -> Comparison:
    """Train and evaluate ``cfg``'s model and the four baselines for every seed, and write ``out/compare.json``.

    All see the same problems in the same order. Runs are those of :class:`Plan`; finished ones are reused, interrupted
    ones resumed.

    Args:
        cfg, out: config of the looped model (``kind`` and ``seed`` are set here); directory, created if missing.
        seeds: of weights and data.
        watching: makes the :class:`~open_mythos.training.fit.Watch` of a run.
        rates: learning rates that each kind tries on the first seed; its other seeds then use the best, by accuracy at
            the trained difficulty, or by bits per byte of text. If empty, all use that of ``cfg``.

    Raises:
        ValueError: as :class:`Plan`, before anything is trained, or if ``out`` holds runs with other settings.
    """
    plan = Plan(cfg, out, seeds, rates)
    cfg, task = plan.cfg, tasks.load(cfg.task.name, **cfg.task.options)
    contenders, paired = [], {}
    for kind in KINDS:
        tried = {rate: _score(cfg, kind, plan.trained(kind, seeds[0], rate, watching)) for rate in plan.rates}
        rate = max(tried, key=tried.__getitem__)
        found = [plan.trained(kind, seed, rate, watching) for seed in seeds]
        scores = [load_evaluation(run) for run in found]
        contender, paired[kind] = _contender(plan.of(kind, seeds[0], rate), task, scores)
        contender.tried = {f"{rate:g}": abs(score) for rate, score in tried.items()}
        kinds = [] if isinstance(scores[0], Evaluation) else [load_kinds(run) for run in found]
        contender.by_token = {
            name: sum(one[name] for one in kinds) / len(kinds)
            for name in TOKEN_KINDS
            if kinds and all(name in one for one in kinds)
        }
        contenders.append(contender)
    measure = "accuracy" if isinstance(scores[0], Evaluation) else "bits per byte"
    # For text, only the first difficulty is evaluated
    difficulties, trained = cfg.evaluation.difficulties[: len(contenders[0].mean)], cfg.task.max_difficulty
    comparison = Comparison(
        cfg.recipe, task.unit, measure, difficulties, trained, cfg.loops.trained, list(seeds), contenders,
        *_worth(cfg, measure, paired),
    )  # fmt: skip
    files.write_json(out / RESULTS, comparison.to_dict())
    return comparison


def _score(cfg: TrainConfig, kind: str, run: Path) -> float:
    """Score of a learning rate: accuracy at the greatest evaluated difficulty that was trained, or minus the bits."""
    found = load_evaluation(run)
    loops, values, _ = _values([found])
    column = loops.index(cfg.loops.trained) if kind == "looped" else 0
    if not isinstance(found, Evaluation):
        return -float(values[0, column, 0])
    difficulties = found.grids[0].difficulties
    hardest = max((d for d in difficulties if d <= cfg.task.max_difficulty), default=min(difficulties))
    return float(values[difficulties.index(hardest), column, 0])


def _worth(
    cfg: TrainConfig, measure: str, paired: dict[str, Tensor]
) -> tuple[list[OverSeeds | None], list[OverSeeds | None]]:
    """Share of the gap closed, and exponent, at each difficulty; ``paired``: (D, seeds) of each kind, at its depth."""
    model = baselines.counted(dataclasses.replace(cfg, kind="looped"))
    core = model.recurrent
    looped = sum(p.numel() for p in core.parameters()) - sum(p.numel() for p in core.act.parameters())
    once = sum(
        p.numel() for part in (*model.prelude, *model.coda, model.norm, model.input_norm) for p in part.parameters()
    )
    sign = -1 if measure == "accuracy" else 1
    closed, exponent = [], []
    for rows in zip(*(paired[kind].tolist() for kind in ("single", "looped", "unrolled")), strict=True):
        seeds = [
            (sign * single, sign * at_depth, sign * unrolled) for single, at_depth, unrolled in zip(*rows, strict=True)
        ]
        closed.append(over_seeds([gap_closed(losses, MIN_DIFFERENCE) for losses in seeds]))
        exponents = [
            loop_exponent(losses, once, looped, cfg.loops.trained, MIN_DIFFERENCE) for losses in seeds if sign > 0
        ]
        exponent.append(over_seeds(exponents))
    return closed, exponent


def _contender(
    cfg: TrainConfig, task: tasks.Task, scores: list[Evaluation | dict[int, float]]
) -> tuple[Contender, Tensor]:
    """A contender, and accuracy or bits of its seeds at the depth of training, (D, seeds)."""
    loops, values, used = _values(scores)
    is_text = not isinstance(scores[0], Evaluation)
    low, high = student_interval(values, math.inf if is_text else 1.0)
    worst = values.amax(-1) if is_text else values.amin(-1)
    model, flops = baselines.counted(cfg), []
    for difficulty, row in zip(cfg.evaluation.difficulties, used.tolist(), strict=False):
        context = baselines.mean_context(cfg, difficulty)
        flops.append([flops_per_token(model.cfg, n, context) for n in row])
    mean, least, below, above = (x.tolist() for x in (values.mean(-1), worst, low, high))
    n_parameters, training = sum(p.numel() for p in model.parameters()), cfg.steps * flops_per_step(cfg)
    contender = Contender(cfg.kind, loops, n_parameters, training, flops, mean, least, below, above, cfg.optim.lr)
    return contender, values[:, loops.index(cfg.loops.trained) if cfg.kind == "looped" else 0]


def _values(scores: list[Evaluation | dict[int, float]]) -> tuple[list[int], Tensor, Tensor]:
    """Loops (L), accuracy or bits (D, L, seeds), and mean loops that positions ran (D, L)."""
    grids = [score.grids[0] for score in scores if isinstance(score, Evaluation)]
    if grids:
        used = torch.stack([grid.loops_used for grid in grids]).mean(0)
        return grids[0].loops, torch.stack([grid.accuracy for grid in grids], -1), used
    bits = [score for score in scores if not isinstance(score, Evaluation)]
    values = torch.tensor([list(curve.values()) for curve in bits], dtype=torch.float64)
    loops = list(bits[0])
    return loops, values.T[None], torch.tensor([loops], dtype=torch.float64)
