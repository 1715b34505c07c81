"""Accuracy over difficulty and loops, with confidence intervals."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from open_mythos import files
from open_mythos.arguments import checked
from open_mythos.evaluation.depth import chunks, device_of, measuring, readings
from open_mythos.fields import must
from open_mythos.model import OpenMythos
from open_mythos.nn.exits import Exit, spell
from open_mythos.tasks.base import Batch, Task

Z95 = 1.96
_SHAPES: dict[Any, Any] = {Tensor: [[float]], list[int]: [int], str | None: (str, type(None)), dict[str, Any]: dict}
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""Two-sided quantiles of Student's t for 1, 2, ... degrees of freedom; the last, slightly wide, is used beyond."""


@dataclass(eq=False)
class DepthGrid:
    """Accuracy over D difficulties and L loop counts. All tensors are (D, L) float64 on the CPU.

    Attributes:
        task, version, options, unit, chance: of the task.
        difficulties: D of them, counted in ``unit``.
        loops: L of them, ascending.
        examples: problems per difficulty.
        seed: of the problems.
        exit: the early-exit rule, as ``mythos eval --exit`` takes it; None: all positions ran every loop.
        accuracy, low, high: share of a problem's scored tokens that are right, mean and normal 95% interval.
        exact, exact_low, exact_high: share of problems without an error, and Wilson's 95% interval.
        loops_used: loops run by a position, mean over positions without padding.
    """

    task: str
    version: int
    unit: str
    chance: float
    difficulties: list[int]
    loops: list[int]
    examples: int
    seed: int
    exit: str | None
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
        values = {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}
        return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any], name: str = "the depth grid") -> Self:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: naming the invalid field of ``name``, and what was expected.
        """
        kinds = {spec.name: spec.type for spec in dataclasses.fields(cls)}
        data = dict(data)
        if "halting" in data:  # written before exits had names
            data["exit"] = "gate" if data.pop("halting") else None
        missing, unknown = sorted(kinds.keys() - data), sorted(data.keys() - kinds)
        if missing or unknown:
            raise ValueError(
                f"{name} is not a depth grid: fields missing: {missing}, unknown: {unknown}; measure it again"
            )
        files.shaped(data, {key: _SHAPES.get(kind, kind) for key, kind in kinds.items()}, name)
        size, tensors = (len(data["difficulties"]), len(data["loops"])), dict[str, Tensor]()
        for key in (key for key, kind in kinds.items() if kind is Tensor):
            fits = len(data[key]) == size[0] > 0 and all(len(row) == size[1] > 0 for row in data[key])
            must(
                fits,
                f"{name}: {key} should have {size[0]} rows of {size[1]}, one for each difficulty and number of loops",
            )
            tensors[key] = torch.tensor(data[key], dtype=torch.float64)
        return cls(**data | tensors)


@checked
def depth_grid(
    model: OpenMythos, task: Task, difficulties: Sequence[int], loops: Sequence[int], examples: int = 256,
    seed: int = 0, halting: bool | None = None, progress: Callable[[str], None] | None = None, exit: Exit | None = None,
) -> DepthGrid:  # fmt: skip
    """Evaluate ``model`` on new problems: one run per difficulty, scored at every loop count.

    The problems of a difficulty depend only on ``seed`` and ``examples``, so that models and settings are compared on
    the same ones.

    Args:
        model: run in eval mode, on its device; its mode and config are restored.
        task, difficulties, examples, seed: decide the problems, ``examples`` of each difficulty.
        loops: numbers of loops to evaluate.
        halting: overrides ``cfg.halting`` unless None.
        progress: called at the start of each difficulty.
        exit: early-exit rule to use instead of the gate.

    Raises:
        ValueError: for problems that do not fit the model, or for difficulties or loops that are empty or invalid.
    """
    check_fit(model, task, difficulties, examples)
    scores = []
    with measuring(model, halting) as model:
        rule = model.recurrent.choose_exit(exit)
        for difficulty in difficulties:
            if progress is not None:
                progress(f"{difficulty} {task.unit}")
            problems = task.batch(examples, difficulty, torch.Generator().manual_seed(seed))
            scores.append(score_by_loops(model, task, problems, loops, exit))
    accuracy, exact, used = (torch.stack(parts) for parts in zip(*scores, strict=True))
    low, high = (end.clamp(0, 1) for end in mean_interval(accuracy, Z95))
    exact_low, exact_high = wilson_interval(exact.mean(-1), examples)
    return DepthGrid(
        task.name, task.version, task.unit, task.chance, list(difficulties), sorted(set(loops)), examples, seed,
        None if rule is None else spell(rule),
        accuracy.mean(-1), low, high, exact.mean(-1), exact_low, exact_high, used, task.to_dict(),
    )  # fmt: skip


def check_fit(model: OpenMythos, task: Task, difficulties: Sequence[int], examples: int) -> None:
    """Raise ValueError without difficulties or examples, or if the task's vocabulary or lengths exceed the model's."""
    if not difficulties or examples < 1:
        raise ValueError(f"difficulties={list(difficulties)}, examples={examples}; give at least one of each")
    n, known = task.vocab_size, model.cfg.vocab_size
    if n > known:
        raise ValueError(
            f"{task.name} has {n} tokens and the model {known}; use the task and options it was trained on"
        )
    longest, limit = max(difficulties, key=task.length), model.cfg.max_seq_len
    said = f"{longest} {task.unit} are {task.length(longest)} tokens, which do not fit max_seq_len={limit}"
    must(task.length(longest) <= limit, f"{said}; use a lower difficulty")


class Scores(NamedTuple):
    """Share of each problem's scored tokens that are right (L, n), whether all are (L, n), and loops run, mean over
    positions (L,); float64 on the CPU."""

    tokens: Tensor
    exact: Tensor
    loops_used: Tensor


def score_by_loops(
    model: OpenMythos, task: Task, batch: Batch, loops: Sequence[int], exit: Exit | None = None
) -> Scores:
    """Score ``batch`` at each of ``loops``, one chunk of rows at a time; use it inside ``measuring``."""
    parts = []  # (3, L, rows) each: share of tokens right, whether all are, and loops used, summed over positions
    for part in chunks(batch, device_of(model)):
        rows = []
        for reading in readings(model, part.ids, loops, part.valid, exit=exit):
            score = task.score(reading.logits.argmax(-1), part.targets)
            rows.append(torch.stack([score.tokens, score.exact.float(), reading.used.sum(1).float()]))
        parts.append(torch.stack(rows, 1).cpu())
    tokens, exact, used = torch.cat(parts, -1).double()
    n_valid = batch.ids.numel() if batch.valid is None else int(batch.valid.bool().sum())
    return Scores(tokens, exact, used.sum(1) / n_valid)


class Spread(NamedTuple):
    """Mean, worst and 95% interval of the mean (Student's t) over runs, (D, L) float64 each."""

    mean: Tensor
    worst: Tensor
    low: Tensor
    high: Tensor


def t_quantile(n: int) -> float:
    """Student's t for the 95% interval of the mean of ``n`` values."""
    return T95[min(n - 1, len(T95)) - 1]


def student_interval(values: Tensor, most: float = 1.0) -> tuple[Tensor, Tensor]:
    """95% interval of the mean over the last axis, for few values such as one per seed (Student's t).

    It is clamped to 0 and ``most``; that of a single value is the value plus and minus 1, clamped.
    """
    low, high = mean_interval(values, t_quantile(values.shape[-1]))
    return low.clamp(min=0), high.clamp(max=most)


def mean_interval(values: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Mean over the last axis plus and minus ``quantile`` standard errors; plus and minus 1 for a single value."""
    n, mean = values.shape[-1], values.mean(-1)
    half_width = quantile * values.std(-1) / math.sqrt(n) if n > 1 else torch.ones_like(mean)
    return mean - half_width, mean + half_width


def wilson_interval(share: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """95% interval of a proportion of ``n`` binary outcomes (Wilson 1927), valid near 0 and 1 too."""
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half_width = Z95 / (1 + Z95**2 / n) * (share * (1 - share) / n + Z95**2 / (4 * n**2)).sqrt()
    return (centre - half_width).clamp(min=0), (centre + half_width).clamp(max=1)


def combine(grids: Sequence[DepthGrid]) -> dict[str, Spread]:
    """Aggregate ``grids`` of one task, difficulties and loops over seeds of models or problems.

    Returns:
        ``{"accuracy": ..., "exact": ...}``. The intervals of a single grid are (0, 1).

    Raises:
        ValueError: if there are none, or they do not match.
    """
    if not grids:
        raise ValueError("no grids to combine; give at least one")
    for grid in grids[1:]:
        for name in ("task", "version", "options", "difficulties", "loops", "exit"):
            a, b = getattr(grids[0], name), getattr(grid, name)
            if a != b:
                raise ValueError(f"grids differ in {name}: {a} and {b}; combine only grids with the same settings")
    stacked = {name: torch.stack([getattr(grid, name) for grid in grids], dim=-1) for name in ("accuracy", "exact")}
    return {name: Spread(x.mean(-1), x.amin(-1), *student_interval(x)) for name, x in stacked.items()}
