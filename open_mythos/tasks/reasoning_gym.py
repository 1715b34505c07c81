"""Any generator of ``reasoning-gym`` (2505.24760) as a task, by bytes."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from open_mythos.fields import must, nearest, options, size, text
from open_mythos.install import missing
from open_mythos.tasks.base import UNSCORED, Batch, Task, pad
from open_mythos.tasks.tokenizer import Tokenizer

ANSWER, END = 257, 258
TRIES = 20
"""Problems drawn for each one wanted, before giving up on finding enough that are short enough."""

Entry = dict[str, Any]
"""A problem as reasoning-gym gives it, with its ``question`` and ``answer``, and the ``difficulty`` it was drawn at."""


@dataclass
class ReasoningGym(Task):
    """Question, ``<answer>``, answer, by UTF-8 bytes. Scored are the bytes of the answer and the end after it.

    Each is asked at the token before it, so that a model reads its answer as it writes it. Token 1 + b is byte b.

    Args:
        generator: the name of a dataset of reasoning-gym.
        difficulty_knob: what difficulty sets: a whole number in the config of the generator, or ``"terms"`` for both
            ``min_terms`` and ``max_terms``. Empty: the first there is.
        max_tokens: problems that are longer are passed over.
        settings: other fields of the config of the generator.

    Raises:
        ValueError: for an unknown generator, knob or setting, with the nearest known one.
        ImportError: naming the extra to install, without ``reasoning-gym``.
    """

    name = "reasoning_gym"
    generator: str = text("chain_sum")
    difficulty_knob: str = text("")
    max_tokens: int = size(256, minimum=3)
    settings: dict[str, Any] = options()

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise missing("task reasoning_gym needs reasoning-gym", "tasks") from error
        name = self.generator
        must(name in DATASETS, f"reasoning_gym has no generator {name!r}; {nearest(name, DATASETS)}")
        self._dataset, self._config = DATASETS[name]
        defaults = {field.name: field.default for field in dataclasses.fields(self._config)}
        for key in self.settings:
            must(key in defaults, f"{name} has no setting {key!r}; {nearest(key, defaults)}")

        knobs = _knobs(defaults) or {"": ()}  # some have no numbers to set, and one difficulty
        self.difficulty_knob = knob = self.difficulty_knob or next(iter(knobs))
        must(knob in knobs, f"{name} has no knob {knob!r}; {nearest(knob, knobs)}")
        self._knob_fields = knobs[knob]
        self.unit = knob or "nothing"
        self.most = None if knob else 1

        self._bytes = Tokenizer()
        self.vocab = ("<pad>", *(repr(piece)[2:-1] for piece in self._bytes.pieces[1:]), "<answer>", "<end>")
        self.chance = 1 / self.vocab_size

    def length(self, difficulty: int) -> int:
        return self.max_tokens

    def batch(self, n: int, difficulty: int, generator: torch.Generator | None = None) -> Batch:
        return self.encode(self.entries(n, difficulty, generator))

    def entries(self, n: int, difficulty: int, generator: torch.Generator | None = None) -> list[Entry]:
        """The ``n`` problems of :meth:`batch` as reasoning-gym gives them.

        Raises:
            ValueError: for a difficulty that the generator does not take, or at which too few problems fit into
                ``max_tokens``.
        """
        self.check(difficulty)
        seed = int(torch.randint(1 << 31, (), generator=generator))
        found: list[Entry] = []
        try:
            dataset = self._problems(difficulty, seed, n * TRIES)
            with _python_random(seed):
                for i in range(n * TRIES):
                    entry = dataset[i]
                    if entry["answer"] is not None and self._n_tokens(entry) <= self.max_tokens:
                        found.append(entry | {"difficulty": difficulty})
                        if len(found) == n:
                            return found
        except (AssertionError, LookupError, TypeError, ValueError) as error:  # how generators refuse a config
            raise ValueError(
                f"reasoning-gym's {self.generator} fails at difficulty={difficulty}, settings={self.settings}: {error}"
            ) from error
        raise ValueError(
            f"{len(found)} of {n * TRIES} {self.generator} problems at difficulty={difficulty} have an answer and fit "
            f"into max_tokens={self.max_tokens}; raise that, or use another generator"
        )

    def encode(self, entries: Sequence[Entry]) -> Batch:
        """Problems as tokens, padded on the right to the longest."""
        rows = []
        for entry in entries:
            question, answer = self._question(entry), self._answer(entry)
            ids = torch.tensor([question + answer[:-1]])
            targets = torch.full_like(ids, UNSCORED)
            targets[0, len(question) - 1 :] = torch.tensor(answer)
            rows.append(Batch(ids, targets))
        return pad(rows)

    def texts(self, answers: Tensor, targets: Tensor) -> list[str]:
        """What ``answers`` (n, T) say at the scored positions of ``targets`` (n, T), up to their first end."""
        said = []
        for row, scored in zip(answers, targets != UNSCORED, strict=True):
            ids = row[scored].tolist()
            end = ids.index(END) if END in ids else len(ids)
            said.append(self._bytes.decode(i for i in ids[:end] if i < ANSWER))
        return said

    def score_text(self, answers: Sequence[str], entries: Sequence[Entry]) -> Tensor:
        """reasoning-gym's own verdict on ``answers`` to ``entries``, (n,) float32 from 0 to 1.

        Other than :meth:`score`, it gives credit to every right answer where there are several.
        """
        judges = {d: self._problems(d, 0, 1) for d in {entry["difficulty"] for entry in entries}}
        pairs = zip(answers, entries, strict=True)
        return torch.tensor(
            [judges[entry["difficulty"]].score_answer(answer, entry) for answer, entry in pairs]
        ).float()

    def _problems(self, difficulty: int, seed: int, size: int) -> Any:
        """The dataset of reasoning-gym at a difficulty; it makes its entries when asked for them."""
        wanted = {field: difficulty for field in self._knob_fields}
        return self._dataset(self._config(**self.settings | wanted | {"seed": seed, "size": size}))

    def _question(self, entry: Entry) -> list[int]:
        return [*self._bytes.encode([entry["question"]]).tolist(), ANSWER]

    def _answer(self, entry: Entry) -> list[int]:
        return [*self._bytes.encode([str(entry["answer"])]).tolist(), END]

    def _n_tokens(self, entry: Entry) -> int:
        return len(self._question(entry)) + len(self._answer(entry)) - 1  # the end is a target only


@contextmanager
def _python_random(seed: int) -> Iterator[None]:
    """Python's own random state, which a few generators draw from instead of their seed, set for a while."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


def _knobs(defaults: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Names of the whole numbers among config fields, and which fields each sets: two where there is a least and a
    greatest."""
    numbers = {name for name, value in defaults.items() if type(value) is int} - {"size", "seed"}
    knobs: dict[str, tuple[str, ...]] = {}
    for name in filter(numbers.__contains__, defaults):
        bare = name.removeprefix("min_").removeprefix("max_")
        pair = (f"min_{bare}", f"max_{bare}")
        if numbers.issuperset(pair):
            knobs[bare] = pair
        else:
            knobs[name] = (name,)
    return knobs
