"""All tasks in words together, for one model that answers their questions and then ends."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F

from open_mythos.fields import choice, must, nearest, options
from open_mythos.tasks.assignments import Assignments
from open_mythos.tasks.base import UNSCORED, Batch, Share, Task, pad
from open_mythos.tasks.english import END, ID, InWords
from open_mythos.tasks.registers import Registers
from open_mythos.tasks.relations import Relations
from open_mythos.tasks.word_problems import WordProblems

_KINDS: dict[str, Any] = {kind.name: kind for kind in (Assignments, WordProblems, Relations, Registers)}
_SCALE = {"relations": 0.5, "registers": 2.0}  # of their difficulty to ours


@dataclass
class Words(InWords):
    """Problems of :class:`Assignments`, :class:`WordProblems`, :class:`Relations` and :class:`Registers`.

    A batch alternates between the tasks, and a training step has a batch of each (:meth:`shares`): with one task per
    step, the steps pull the weights back and forth, and the next one undoes what was learned of the last.

    In training the last question of a prompt is followed by its answer, the target of which is ``<end>`` at every step:
    a model writes its answer and ends. In the held-out split, which measures accuracy, the answers alone are scored;
    so they are for problems in the tokens of a pretrained model, which has its own way to end.

    Difficulty is the number of steps: that number of hops of ``assignments`` and operations of ``word_problems``, half
    of it in hops of ``relations`` (rounded up), and twice of it in lines of ``registers``, up to what all tasks can
    make. Smaller problems (:meth:`sized`) are limited to the greatest difficulty of their size.

    Attributes:
        weights: weight of each task in the loss, by name, as in ``{"relations": 2, "registers": 1}``; tasks that are
            not named are left out. Empty: all four, equally.
        settings: options of the tasks, by name, as in ``{"word_problems": {"people": 20}}``.
        split: ``"train"`` or ``"held_out"``.
        parts: the tasks.

    Raises:
        ValueError: for a name that is no task in words, a weight that is not above 0, or as the tasks.
    """

    name = "words"
    version = 4
    unit = "steps"
    has_steps = True
    weights: dict[str, float] = options()
    settings: dict[str, dict[str, Any]] = options()
    split: str = choice("train", "train", "held_out")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (*self.weights, *self.settings):
            must(name in _KINDS, f"{name!r} is not a word task; {nearest(name, _KINDS)}")
        for name, weight in self.weights.items():
            is_number = isinstance(weight, int | float) and not isinstance(weight, bool) and 0 < weight < math.inf
            must(is_number, f"weights: {name}={weight!r}; use a number above 0, or leave {name} out")
        self.parts: list[InWords] = [self._part(name) for name in _KINDS if name in (self.weights or _KINDS)]
        for part in self.parts:
            replace(part, tokenizer=self.tokenizer)  # validates the options with this tokenizer
        self.chance = sum(part.chance for part in self.parts) / len(self.parts)
        limits = [int(part.most / _SCALE.get(part.name, 1)) for part in self.parts if part.most is not None]
        self.most = min(limits, default=None)

    def _part(self, name: str) -> InWords:
        given = self.settings.get(name, {})
        must(isinstance(given, dict), f"settings: {name}={given!r} is not a dictionary; use one of options and values")
        known = [field for field in _KINDS[name].__dataclass_fields__ if field not in ("split", "tokenizer")]
        for option in given:
            must(option in known, f"settings: {name} has no option {option!r}; it has {', '.join(known)}")
        return _KINDS[name](**given, split=self.split)

    def sized(self, size: float) -> Self:
        smaller = replace(self)
        smaller.parts = [part.sized(size) for part in self.parts]
        return smaller

    @staticmethod
    def level(part: Task, difficulty: int) -> int:
        """The difficulty of a part's problems for a ``difficulty`` of this task."""
        level = math.ceil(difficulty * _SCALE.get(part.name, 1))
        return level if part.most is None else min(level, part.most)

    def by_kind(self, difficulties: Sequence[int]) -> list[tuple[Task, list[int]]]:
        parts = [(part, sorted({self.level(part, each) for each in difficulties})) for part in self.parts]
        return [(replace(part, tokenizer=self.tokenizer), levels) for part, levels in parts]

    def length(self, difficulty: int) -> int:
        return self.tokens(1 + max(part.length(self.level(part, difficulty)) for part in self.parts))

    def n_steps(self, difficulty: int) -> int:
        return max(part.n_steps(self.level(part, difficulty)) for part in self.parts)

    def shares(self) -> list[Share]:
        weight = {part.name: self.weights.get(part.name, 1.0) for part in self.parts}
        total = sum(weight.values())
        return [Share(name, each / total, replace(self, weights={name: each})) for name, each in weight.items()]

    def batch(self, n: int, difficulty: int, generator: torch.Generator | None = None) -> Batch:
        first = int(torch.randint(0, len(self.parts), (), generator=generator))
        in_turn = [*self.parts[first:], *self.parts[:first]]
        rows = [(part, len(range(i, n, len(in_turn)))) for i, part in enumerate(in_turn)]
        batches = [part.batch(k, self.level(part, difficulty), generator) for part, k in rows if k]
        ends = self.split == "train" and not self.tokenizer
        return self.told(pad([_ended(batch) for batch in batches] if ends else batches))


def _ended(batch: Batch) -> Batch:
    """Append the answer to the last question, with target ``<end>``; not in rows whose last question is unscored."""
    assert batch.steps is not None, "tasks in words say what is known after each step"
    valid = torch.ones_like(batch.ids, dtype=torch.bool) if batch.valid is None else batch.valid
    end = valid.sum(1, keepdim=True)
    answer = batch.targets.gather(1, end - 1)
    counts = answer != UNSCORED
    valid = F.pad(valid, (0, 1)).scatter(1, end, counts)
    target = torch.where(counts, ID[END], UNSCORED)
    steps = F.pad(batch.steps, (0, 0, 0, 1), value=UNSCORED)
    return Batch(
        F.pad(batch.ids, (0, 1)).scatter(1, end, answer.where(counts, 0)),
        F.pad(batch.targets, (0, 1), value=UNSCORED).scatter(1, end, target),
        None if bool(valid.all()) else valid,
        steps.scatter(1, end[..., None].expand(-1, -1, steps.shape[2]), target[..., None].expand_as(steps[:, :1])),
    )
