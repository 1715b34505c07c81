"""Any generator of ``reasoning-gym`` (2505.24760) as a task, by bytes."""

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from open_mythos.fields import must, nearest, options, size, text
from open_mythos.install import missing
from open_mythos.tasks.base import UNSCORED, Batch, Task, pad
from open_mythos.tasks.tokenizer import Tokenizer

ANSWER, END = 257, 258
_DRAWN = {"size", "seed"}  # settings of a generator that every batch draws
MAX_DRAWS_PER_PROBLEM = 20  # after which rejection sampling gives up

Entry = dict[str, Any]
"""An entry of a reasoning-gym dataset (``question``, ``answer``, ...) with the ``difficulty`` it was drawn at."""


@dataclass
class ReasoningGym(Task):
    """Question, ``<answer>``, answer, ``<end>``, as UTF-8 bytes; token 1 + b is byte b.

    Scored are the answer and ``<end>``, by next-token prediction.

    Args:
        generator: the name of a reasoning-gym dataset.
        difficulty_knob: the integer of the generator's config that difficulty sets, or e.g. ``"terms"`` for both
            ``min_terms`` and ``max_terms``. Empty: the first one.
        max_tokens: longer problems are rejected.
        settings: other fields of the generator's config.

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
            must(key not in _DRAWN, f"settings: {key} is drawn for every batch; leave it out")

        knobs = _knobs(defaults) or {"": ()}  # without integers there is one difficulty
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
        """The ``n`` problems of :meth:`batch` as reasoning-gym entries.

        Raises:
            ValueError: for a difficulty that the generator rejects, or at which too few problems fit ``max_tokens``.
        """
        seed, n_draws = int(torch.randint(1 << 31, (), generator=generator)), n * MAX_DRAWS_PER_PROBLEM
        entries: list[Entry] = []
        state = random.getstate()
        try:
            dataset = self._load_dataset(difficulty, seed, n_draws)
            random.seed(seed)  # a few generators use Python's global random state instead of their own
            for i in range(n_draws):
                entry = dataset[i]
                if entry["answer"] is not None and sum(map(len, self._tokens(entry))) - 1 <= self.max_tokens:
                    entries.append(entry | {"difficulty": difficulty})
                    if len(entries) == n:
                        return entries
        except (AssertionError, LookupError, TypeError, ValueError) as error:  # raised by generators for a bad config
            raise ValueError(
                f"reasoning-gym's {self.generator} fails at difficulty={difficulty}, settings={self.settings}: {error}"
            ) from error
        finally:
            random.setstate(state)
        raise ValueError(
            f"{len(entries)} of {n_draws} {self.generator} problems at difficulty={difficulty} have an answer and fit "
            f"into max_tokens={self.max_tokens}; raise that, or use another generator"
        )

    def encode(self, entries: Sequence[Entry]) -> Batch:
        """Problems as tokens, padded on the right to the longest."""
        rows = []
        for entry in entries:
            question, answer = self._tokens(entry)
            ids = torch.tensor([question + answer[:-1]])
            targets = torch.full_like(ids, UNSCORED)
            targets[0, len(question) - 1 :] = torch.tensor(answer)
            rows.append(Batch(ids, targets))
        return pad(rows)

    def texts(self, answers: Tensor, targets: Tensor) -> list[str]:
        """``answers`` (n, T) as text: the scored positions of ``targets`` (n, T), up to the first ``<end>``."""
        texts = []
        for row, scored in zip(answers, targets != UNSCORED, strict=True):
            ids = row[scored].tolist()
            end = ids.index(END) if END in ids else len(ids)
            texts.append(self._bytes.decode(i for i in ids[:end] if i < ANSWER))
        return texts

    def score_text(self, answers: Sequence[str], entries: Sequence[Entry]) -> Tensor:
        """reasoning-gym's own scores of ``answers`` to ``entries``, (n,) float32 from 0 to 1.

        Unlike :meth:`score`, it accepts every right answer where there are several.
        """
        scorers = {d: self._load_dataset(d, 0, 1) for d in {entry["difficulty"] for entry in entries}}
        pairs = zip(answers, entries, strict=True)
        return torch.tensor([scorers[e["difficulty"]].score_answer(answer, e) for answer, e in pairs]).float()

    def _load_dataset(self, difficulty: int, seed: int, size: int) -> Any:
        knob = dict.fromkeys(self._knob_fields, difficulty)
        return self._dataset(self._config(**self.settings | knob | {"seed": seed, "size": size}))

    def _tokens(self, entry: Entry) -> tuple[list[int], list[int]]:
        """Question and answer; ``<end>``, the last token of the answer, is only a target."""
        question, answer = (self._bytes.encode([str(entry[key])]).tolist() for key in ("question", "answer"))
        return [*question, ANSWER], [*answer, END]


def _knobs(defaults: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """The integer config fields that difficulty can set, by name; ``min_x`` and ``max_x`` are one knob ``x``."""
    numbers = {name for name, value in defaults.items() if type(value) is int} - _DRAWN
    knobs: dict[str, tuple[str, ...]] = {}
    for name in filter(numbers.__contains__, defaults):
        bare = name.removeprefix("min_").removeprefix("max_")
        pair = (f"min_{bare}", f"max_{bare}")
        knobs |= {bare: pair} if numbers.issuperset(pair) else {name: (name,)}
    return knobs
