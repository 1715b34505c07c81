"""Arithmetic in words: how many coins somebody has, where most have some number more, fewer or as many as others."""

from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.fields import choice, must, size
from open_mythos.tasks.base import UNSCORED, Batch
from open_mythos.tasks.english import (
    ALL_KINDS,
    CHAINS,
    ID,
    NAMES,
    NUMBERS,
    InWords,
    Patterns,
    chosen,
    joined,
    named,
    numbers,
    sentence_of,
)

HAS = Patterns(
    "{0} has {3} coins .", "{0} holds {3} coins .", "{0} keeps {3} coins .", "the number of coins that {0} has is {3} ."
)
MORE = Patterns(
    "{0} has {3} more coins than {1} .", "{0} has as many coins as {1} and {3} more .", "{0} holds {3} more than {1} .",
    "add {3} to what {1} has and it is what {0} has .",
)  # fmt: skip
FEWER = Patterns(
    "{0} has {3} fewer coins than {1} .", "{0} has as many coins as {1} less {3} .", "{0} holds {3} fewer than {1} .",
    "take {3} from what {1} has and it is what {0} has .",
)  # fmt: skip
TWICE = Patterns(
    "{0} has twice as many coins as {1} .", "{0} has twice what {1} has .", "{0} holds twice the coins of {1} .",
    "twice what {1} has is what {0} has .",
)  # fmt: skip
SAME = Patterns(
    "{0} has as many coins as {1} .", "{0} has the same number of coins as {1} .", "{0} holds as many as {1} .",
    "the number of coins that {1} has is what {0} has .",
)  # fmt: skip
BOTH = Patterns(
    "{0} has as many coins as {1} and {2} together .", "{0} has the sum of what {1} and {2} have .",
    "{0} holds as many as both {1} and {2} .", "what {1} and {2} have together is what {0} has .",
)  # fmt: skip
ASKS = Patterns(
    "how many coins has {0} ?", "how many coins does {0} have ?", "{0} has how many coins ?",
    "what is the number of coins that {0} has ?",
)  # fmt: skip

_KINDS = (HAS, MORE, FEWER, TWICE, SAME, BOTH)
_OWN, _MORE, _FEWER, _TWICE, _SAME, _BOTH = range(6)
_FIRST_NAME, _ZERO = ID[NAMES[0]], ID[NUMBERS[0]]
_CONSTANTS = 2  # minimum number of people whose number is stated
_OTHERS = 2  # minimum number of people that the question does not need
_ON = 0.7  # share of the operations whose result the very next one uses
_TWO = 0.3  # share of operations on two people among those that could be on one
_FEW = 2  # operations of the smallest problems: one, and a copy of its result
_MOST_USES = 3  # maximum number of sentences that use a person; with more, allowed pairs of names might run out
_LONGEST = max(kind.codes.shape[1] for kind in _KINDS)


@dataclass
class WordProblems(InWords):
    """People's numbers of coins depend on those of others, in a random graph; all numbers are modulo ``modulus``.

    ``Ana has 3 coins . Ben has 2 more coins than Ana . Cora has as many coins as Ana and Ben together . how many coins
    has Cora ?`` is a problem of two operations: all that the answer depends on. A sentence uses numbers of people from
    earlier sentences only, since a causal model knows a sentence's result at its end.

    Step targets are at the end of each sentence, for its subject, and at the names that it uses: first the name of the
    person, and then the number. At the end of a sentence that is known after one loop if the sentence states it, and
    otherwise one loop after the numbers it uses: in one loop the names look up their numbers, and then the end
    calculates with what is in the sentence, which takes two layers. Supervised with results alone, a model does not
    learn to add two numbers that it cannot find yet. The question names a person too; its answer, known one loop after
    that person's number, is the only final target. No question needs all sentences.

    Difficulty is the number of operations: exact in the held-out split, the maximum in training. Pairs of names that
    occur in one sentence of the held-out split, pairings of a subject with a pattern, and so all its sentences, never
    occur in training.

    Attributes:
        people: maximum number in a problem, four more than the maximum number of operations.
        min_people: minimum number; each batch of training draws a number between the two.
        modulus: an odd number; modulo an even one, twice any number would be even.
        split: ``"train"`` or ``"held_out"``.
    """

    name = "word_problems"
    unit = "operations"
    has_steps = True
    people: int = size(16)
    min_people: int = size(5, minimum=_CONSTANTS + _OTHERS + 1)
    modulus: int = size(7, minimum=5, maximum=len(NUMBERS))
    split: str = choice("train", "train", "held_out")

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high, most = self.min_people, self.people, len(NAMES) // 3
        must(high <= most, f"people={high}; there are only {len(NAMES)} names, so use at most {most}")
        must(low <= high, f"min_people={low} is above people={high}; lower min_people or raise people")
        must(self.modulus % 2 == 1, f"modulus={self.modulus} is even; use an odd one such as 7 or {len(NUMBERS)}")
        self.chance = 1 / self.modulus
        self.most = high - _CONSTANTS - _OTHERS
        self._size = 1.0

    def sized(self, size: float) -> Self:
        task = replace(self, people=self.min_people + int((self.people - self.min_people) * size))
        task._size = size
        if size < CHAINS:
            task.most = min(_FEW, task.people - _CONSTANTS - _OTHERS)
        return task

    def length(self, difficulty: int) -> int:
        return self.tokens(self.people * _LONGEST + ASKS.codes.shape[1])

    def n_steps(self, difficulty: int) -> int:
        return difficulty + 3

    def batch(self, n: int, difficulty: int, generator: torch.Generator | None = None) -> Batch:
        test = self.split != "train"
        low = self.people if test else max(self.min_people, difficulty + _CONSTANTS + _OTHERS)
        total = int(torch.randint(low, self.people + 1, (), generator=generator))
        source = self._graph(n, total, difficulty, generator)
        depth, needs = _needed(source)
        may = torch.tensor([_SAME, _TWICE, _MORE, _FEWER] if self._size >= ALL_KINDS else [_SAME])
        kind = may[torch.randint(0, len(may), (n, total), generator=generator)]
        if self._size < CHAINS:
            kind = kind.masked_fill(depth > 1, _SAME)
        kind = torch.where(source[..., 1] >= 0, _BOTH, kind).masked_fill(source[..., 0] < 0, _OWN)
        top = numbers(self._size, self.modulus)
        number = torch.randint(2, top, (n, total), generator=generator)
        own = torch.randint(0, top, (n, total), generator=generator)
        number = torch.where(kind == _OWN, own, number)
        value = self._values(source, kind, number)
        right = (needs == difficulty) if test else needs * (needs <= difficulty)
        asked = torch.multinomial(right.float(), 1, generator=generator)
        order = _in_order(source, generator)
        name, sources = self._named(source, test, generator)
        words = [_FIRST_NAME + name, _FIRST_NAME + sources[..., 0], _FIRST_NAME + sources[..., 1], _ZERO + number]
        facts = chosen(kind, [patterns.sentences(name, words, test, generator) for patterns in _KINDS])
        facts = facts.gather(1, order[..., None].expand_as(facts))
        person = name.gather(1, asked)
        ids, valid, ends = joined([facts, ASKS.sentences(person, [_FIRST_NAME + person], test, generator)])
        steps = _steps(ids, ends, torch.cat([order, asked], 1), name, value, depth, self.n_steps(difficulty))
        targets = torch.full_like(ids, UNSCORED).scatter_(1, ends[:, -1:], _ZERO + value.gather(1, asked))
        return self.told(Batch(ids, targets, valid, steps))

    def _graph(self, n: int, people: int, operations: int, generator: torch.Generator | None) -> Tensor:
        """The people, earlier in order, whose numbers each person's number is computed from, (n, people, 2); -1: none.

        First come people whose number is stated, then ``operations`` people of whom the last one depends on all the
        others, and then people it does not depend on.
        """
        spare = people - operations - _CONSTANTS - _OTHERS
        first = _CONSTANTS + int(torch.randint(0, spare // 2 + 1, (), generator=generator))
        last = first + operations - 1
        source = torch.full((n, people, 2), -1)
        rows = torch.arange(n)
        on, two = _ON if self._size >= CHAINS else 1.0, _TWO if self._size >= ALL_KINDS else 0.0
        for i in range(last - 1, first - 1, -1):  # its user: a later person with less than two sources so far
            chance = torch.rand(n, last - i, generator=generator)
            chance[:, 0] += (torch.rand(n, generator=generator) < on) * 2.0
            user = i + 1 + chance.masked_fill((source[:, i + 1 : last + 1] >= 0).all(2), -1).argmax(1)
            source[rows, user, (source[rows, user, 0] >= 0).long()] = i
        uses = F.one_hot(source.flatten(1) + 1, people + 1).sum(1)[:, 1:]
        depth = torch.zeros(n, people, dtype=torch.long)
        for i in range(first, people):
            for slot in (0, 1):
                may = (uses[:, :i] < _MOST_USES) & (depth[:, :i] < operations)
                may &= torch.arange(i) != source[:, i, :1]
                if slot == 1 and self._size < CHAINS:  # small problems add only stated numbers
                    may &= (depth[:, :i] == 0) & (depth.gather(1, source[:, i, :1].clamp(min=0)) == 0)
                wanted = may.any(1) & (source[:, i, slot] < 0)
                if slot == 1:
                    wanted &= (torch.rand(n, generator=generator) < two) & (source[:, i, 0] >= 0)
                chance = torch.rand(n, i, generator=generator)
                pick = chance.masked_fill(~may, -1).argmax(1)
                source[:, i, slot] = torch.where(wanted, pick, source[:, i, slot])
                uses[rows, pick] += wanted
            reached = depth.gather(1, source[:, i].clamp(min=0)).masked_fill(source[:, i] < 0, -1)
            depth[:, i] = reached.amax(1) + 1
        swapped = (torch.rand(n, people, generator=generator) < 0.5) & (source[..., 1] >= 0)
        return source.where(~swapped[..., None], source.flip(2))

    def _values(self, source: Tensor, kind: Tensor, number: Tensor) -> Tensor:
        """Each person's number, (n, people)."""
        value = number.clone()
        for i in range(source.shape[1]):
            one, other = value.gather(1, source[:, i].clamp(min=0)).unbind(1)
            c = number[:, i]
            value[:, i] = torch.stack([c, one + c, one - c, 2 * one, one, one + other]).gather(0, kind[None, :, i])[0]
            value[:, i] %= self.modulus
        return value

    def _named(self, source: Tensor, test: bool, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Names of people, (n, people), and of their sources, (n, people, 2)."""
        made_of = F.one_hot(source + 1, source.shape[1] + 1)[..., 1:]
        one, other = made_of.unbind(2)
        together = one.mT @ other
        name = named((one + other + together + together.mT).bool(), test, generator)
        return name, name.gather(1, source.clamp(min=0).flatten(1)).view_as(source)


def _steps(
    ids: Tensor, ends: Tensor, about: Tensor, name: Tensor, value: Tensor, depth: Tensor, n_steps: int
) -> Tensor:
    """Step targets after 0, 1, ... loops at ends of sentences and at the sources in them, (n, T, ``n_steps``).

    Args:
        ids, ends: (n, T) tokens, and the position of the last one of each sentence, (n, S), the question last.
        about: the subject of each sentence, (n, S).
        name, value, depth: of each person, (n, people); ``depth`` is the longest chain of operations to its value.
    """
    person = torch.zeros(len(ids), len(NAMES), dtype=torch.long)
    person.scatter_(1, name, torch.arange(name.shape[1]).expand_as(name))
    sentence, is_end = sentence_of(ids, ends)
    subject, asks = about.gather(1, sentence), sentence == ends.shape[1] - 1
    is_name = (ids >= _FIRST_NAME) & (ids < _FIRST_NAME + len(NAMES))
    named = person.gather(1, (ids - _FIRST_NAME).where(is_name, 0))
    is_source = is_name & ((named != subject) | asks)
    who = named.where(is_source, subject)
    due = depth.gather(1, who) + torch.where(is_source | asks, 2, 1)
    whose, number = (_FIRST_NAME + name).gather(1, who), (_ZERO + value).gather(1, who)
    steps = torch.where(torch.arange(n_steps) < due[..., None], whose[..., None], number[..., None])
    return steps.masked_fill(~(is_source | is_end)[..., None], UNSCORED)


def _needed(source: Tensor) -> tuple[Tensor, Tensor]:
    """Longest chain of operations, and number of operations, that each person's value depends on, (n, people) each."""
    n, people, _ = source.shape
    needs = torch.zeros(n, people + 1, people, dtype=torch.bool)  # the last row for nobody
    depth = torch.full((n, people + 1), -1)
    for i in range(people):
        of = source[:, i].masked_fill(source[:, i] < 0, people)
        needs[:, i] = needs.gather(1, of[..., None].expand(-1, -1, people)).any(1)
        needs[:, i, i] = source[:, i, 0] >= 0
        depth[:, i] = depth.gather(1, of).amax(1) + 1
    return depth[:, :people], needs[:, :people].sum(2)


def _in_order(source: Tensor, generator: torch.Generator | None) -> Tensor:
    """A random topological order of the graph, (n, people): everybody comes after their sources."""
    n, people, _ = source.shape
    said = torch.zeros(n, people + 1, dtype=torch.bool)
    said[:, people] = True  # nobody
    order = torch.empty(n, people, dtype=torch.long)
    of = source.masked_fill(source < 0, people).flatten(1)
    for i in range(people):
        ready = said.gather(1, of).view(n, people, 2).all(2) & ~said[:, :people]
        order[:, i] = torch.rand(n, people, generator=generator).masked_fill(~ready, -1).argmax(1)
        said.scatter_(1, order[:, i : i + 1], True)
    return order
