"""The grid of this field: accuracy over difficulty and loops, with how far it can be trusted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from open_mythos.evaluation.depth import chunks, device_of, measuring, readings
from open_mythos.evaluation.intervals import normal_interval, student_interval, wilson_interval
from open_mythos.model import OpenMythos
from open_mythos.nn.exits import Exit
from open_mythos.tasks.base import Batch, Task


@dataclass(eq=False)
class DepthGrid:
    """Accuracy over D difficulties and L loop counts. All tensors are (D, L) float64 on the CPU.

    Attributes:
        task, version, options, unit, chance: of the task.
        difficulties: D of them, counted in ``unit``.
        loops: L of them, rising.
        examples: problems of each difficulty.
        seed: that the problems were drawn from.
        halting: whether positions could halt.
        accuracy: share of a problem's scored tokens that are right, mean over problems.
        low, high: 95% interval of ``accuracy``: normal, from the spread over problems.
        exact: share of problems that are right throughout.
        exact_low, exact_high: 95% interval of ``exact``: Wilson's.
        loops_used: loops that a position really ran, mean over positions, padding left out.
    """

    task: str
    version: int
    unit: str
    chance: float
    difficulties: list[int]
    loops: list[int]
    examples: int
    seed: int
    halting: bool
    accuracy: Tensor
    low: Tensor
    high: Tensor
    exact: Tensor
    exact_low: Tensor
    exact_high: Tensor
    loops_used: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def curve(self, difficulty: int) -> dict[int, float]:
        """``{loops: accuracy}`` at one difficulty."""
        return dict(zip(self.loops, self.accuracy[self.difficulties.index(difficulty)].tolist(), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values, tensors as nested lists."""
        found = {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}
        return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in found.items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: naming the fields that are missing or unknown.
        """
        kinds = {spec.name: spec.type for spec in dataclasses.fields(cls)}
        missing, unknown = sorted(kinds.keys() - data), sorted(data.keys() - kinds)
        if missing or unknown:
            raise ValueError(f"not a depth grid: fields missing: {missing}, unknown: {unknown}; measure it again")
        values: dict[str, Any] = dict(data)
        for name in kinds:
            if kinds[name] == "Tensor":
                values[name] = torch.tensor(values[name], dtype=torch.float64)
        return cls(**values)


def depth_grid(
    model: OpenMythos,
    task: Task,
    difficulties: Sequence[int],
    loops: Sequence[int],
    examples: int = 256,
    seed: int = 0,
    halting: bool | None = None,
    progress: Callable[[str], None] | None = None,
    exit: Exit | None = None,
) -> DepthGrid:
    """Measure ``model`` on new problems: for each difficulty one run, read at every loop count.

    The problems of a difficulty depend on ``seed`` and ``examples`` alone, so that models, and halting on and off, are
    compared on the same ones.

    Args:
        model: run in eval mode on the device it is on; mode and config are put back after.
        task: draws and scores the problems.
        difficulties: measured one by one.
        loops: numbers of loops to measure at.
        examples: problems of each difficulty.
        seed: of the problems.
        halting: stands in for ``cfg.halting``; None measures the model as it is configured.
        progress: called as each difficulty begins.
        exit: when a position stops looping, in place of the gate.

    Raises:
        ValueError: for problems that do not fit the model, difficulties or loops that do not exist, or none of them.
    """
    check_fit(model, task, difficulties, examples)
    rows = []
    with measuring(model, halting):
        halts = exit is not None or model.cfg.halting
        for difficulty in difficulties:
            if progress is not None:
                progress(f"{difficulty} {task.unit}")
            problems = task.batch(examples, difficulty, torch.Generator().manual_seed(seed))
            rows.append(score_by_loops(model, task, problems, loops, exit))
    accuracy, exact = torch.stack([row.tokens for row in rows]), torch.stack([row.exact for row in rows])
    low, high = normal_interval(accuracy)
    exact_low, exact_high = wilson_interval(exact.mean(-1), examples)
    return DepthGrid(
        task.name, task.version, task.unit, task.chance, list(difficulties), sorted(set(loops)), examples, seed, halts,
        accuracy.mean(-1), low, high, exact.mean(-1), exact_low, exact_high,
        torch.stack([row.loops_used for row in rows]), task.to_dict(),
    )  # fmt: skip


def check_fit(model: OpenMythos, task: Task, difficulties: Sequence[int], examples: int) -> None:
    """Raise ValueError if there is nothing to measure, or the task has tokens that the model does not know."""
    if not difficulties or examples < 1:
        raise ValueError(f"difficulties={list(difficulties)}, examples={examples}; give at least one of each")
    if task.vocab_size > model.cfg.vocab_size:
        raise ValueError(
            f"{task.name} has {task.vocab_size} tokens and the model {model.cfg.vocab_size}; "
            f"use the task and options that the model was trained on"
        )


class Scores(NamedTuple):
    """What :func:`score_by_loops` finds, float64 on the CPU.

    Attributes:
        tokens: (L, n) share of each problem's scored tokens that are right.
        exact: (L, n) 1 where a problem is right throughout.
        loops_used: (L,) loops that a position ran, mean over positions, padding left out.
    """

    tokens: Tensor
    exact: Tensor
    loops_used: Tensor


def score_by_loops(
    model: OpenMythos, task: Task, batch: Batch, loops: Sequence[int], exit: Exit | None = None
) -> Scores:
    """Score ``batch`` at each of ``loops``, a chunk of rows at a time; use it inside ``measuring``."""
    parts = [_score_chunk(model, task, part, loops, exit) for part in chunks(batch, device_of(model))]
    tokens, exact, used = torch.cat(parts, -1).double()
    n_valid = batch.ids.numel() if batch.valid is None else int(batch.valid.bool().sum())
    return Scores(tokens, exact, used.sum(1) / n_valid)


def _score_chunk(model: OpenMythos, task: Task, part: Batch, loops: Sequence[int], exit: Exit | None) -> Tensor:
    """(3, L, n): share of tokens right, whether all are, and loops used, summed over positions."""
    found = []
    for reading in readings(model, part.ids, loops, part.valid, exit=exit):
        score = task.score(reading.logits.argmax(-1), part.targets)
        found.append(torch.stack([score.tokens, score.exact.float(), reading.used.sum(1).float()]))
    return torch.stack(found, 1).cpu()


class Spread(NamedTuple):
    """Of several runs: mean, worst, and the 95% interval of the mean (Student's t), (D, L) float64 each."""

    mean: Tensor
    worst: Tensor
    low: Tensor
    high: Tensor

    def to_dict(self) -> dict[str, Any]:
        return {name: value.tolist() for name, value in self._asdict().items()}


def combine(grids: Sequence[DepthGrid]) -> dict[str, Spread]:
    """What several grids say together, of models trained from different seeds, or of different problems.

    Args:
        grids: of the same task, difficulties and loops.

    Returns:
        ``{"accuracy": ..., "exact": ...}``. One grid alone gives intervals from 0 to 1: it says nothing of others.

    Raises:
        ValueError: if there are none, or they do not match.
    """
    if not grids:
        raise ValueError("no grids to combine; give at least one")
    for grid in grids[1:]:
        for name in ("task", "version", "options", "difficulties", "loops", "halting"):
            ours, theirs = getattr(grids[0], name), getattr(grid, name)
            if ours != theirs:
                raise ValueError(f"grids differ in {name}: {ours} and {theirs}; combine what was measured alike")
    found = {}
    for name in ("accuracy", "exact"):
        values = torch.stack([getattr(grid, name) for grid in grids], dim=-1)
        found[name] = Spread(values.mean(-1), values.amin(-1), *student_interval(values))
    return found
