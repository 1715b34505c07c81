"""Multi-hop questions over people and their relations, from facts in the prompt or learned by heart."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from open_mythos.fields import choice, must, size
from open_mythos.tasks.base import Batch
from open_mythos.tasks.english import (
    ID,
    NAMES,
    RELATIONS,
    InWords,
    Patterns,
    from_loop,
    joined,
    may_pair,
    problems,
)

FACTS = Patterns(
    "the {2} of {0} is {1} .", "{0} 's {2} is {1} .", "{1} is the {2} of {0} .", "the {2} {0} has is {1} ."
)
ASKS = Patterns("who is {0}", "and who is {0}", "now who is {0}", "then who is {0}")

_FIRST_NAME, _FIRST_RELATION = ID[NAMES[0]], ID[RELATIONS[0]]
_FEWEST = 4  # people of a prompt
_LONGEST = FACTS.codes.shape[1]
_MOST = 2 * len(NAMES) // 3
_ONE_DECIDES = 0.5  # share of the smallest training prompts where the person, or almost the relation, identifies a fact
_BOTH_DECIDE = 0.15  # size of prompts (Task.sized) from which that share is divided by five
_SEVERAL = 6  # minimum number of people from that size on: among four a second hop can be guessed
_OTHERS = 8  # people without relations of their own, in a prompt where two have some
_PARTNERS = 2  # minimum number of names that each person may share a sentence with, or relations would not matter


@dataclass
class Relations(InWords):
    """Facts such as ``the boss of Ana is Ben .``, in any order, and questions such as ``who is Ana 's boss 's cook ?``

    That one has two hops, the difficulty. Each person has several relations and each relation holds for many people, so
    that a hop needs both; a path never goes straight back to the person before. A question names its path from the
    inside, so that a causal model can follow it word by word. Each relation on the path has two steps, and a target for
    each: to take over the person found at the word before it, and then to find the fact of that person and relation. So
    the step targets are, at the person's name, the name; at the j-th relation, for 2 j - 2 loops the relation, for one
    loop the person it is about, and from then on the person it leads to; and at the question mark, a loop later still,
    the last of these, the only final target. At the end of a fact the target is the person it leads to.

    A fact is identified by person and relation together, and matching one helps little until the other is matched too.
    So in half of the smallest prompts of training (:meth:`sized`), and a tenth of the others, one of the two is enough:
    many people have one relation each, or two people have many. Their questions have one hop.

    The facts are either in the prompt, or fixed and learned by heart: then the prompt is a question, and the questions
    of one hop, all of which occur in training, teach the facts. Pairs of names that occur in one sentence of the
    held-out split, pairings of a subject with a pattern, and so all its sentences, never occur in training; nor, where
    facts are learned by heart, pairings of a person with a path of two hops or more.

    Attributes:
        facts: ``"prompt"`` or ``"weights"``.
        relations: number for each person.
        sentences: maximum number of facts in a prompt, which decides the number of people.
        min_sentences: minimum number; each batch of training draws a number between the two.
        questions: number in a prompt with facts; no two about the same person, if there are enough people.
        people: number in facts that are learned by heart.
        seed: of facts that are learned by heart.
        split: ``"train"`` or ``"held_out"``.
    """

    name = "relations"
    version = 2
    unit = "hops"
    has_steps = True
    facts: str = choice("prompt", "prompt", "weights")
    relations: int = size(3, minimum=2, maximum=len(RELATIONS))
    sentences: int = size(30)
    min_sentences: int = size(12)
    questions: int = size(4)
    people: int = size(64, minimum=8, maximum=len(NAMES))
    seed: int = size(0, minimum=0)
    split: str = choice("train", "train", "held_out")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._size = 1.0
        if self.facts == "prompt":
            low, high, each = self.min_sentences, self.sentences, self.relations
            must(
                high <= _MOST * each,
                f"sentences={high}; there are only {len(NAMES)} names, so use at most {_MOST * each}",
            )
            must(low <= high, f"min_sentences={low} is above sentences={high}; lower min_sentences or raise sentences")
            least = _FEWEST * each
            must(low >= least, f"min_sentences={low}; use at least {least}: {_FEWEST} people, {each} relations each")
        self.chance = 1 / (self.people if self.facts == "weights" else self.sentences // self.relations)

    def sized(self, size: float) -> Self:
        low, high = self.min_sentences, self.sentences
        if size >= _BOTH_DECIDE:
            low = min(max(low, _SEVERAL * self.relations), high)
        task = replace(self, min_sentences=low, sentences=low + int((high - low) * size))
        task._size = size
        return task

    def length(self, difficulty: int) -> int:
        question = ASKS.codes.shape[1] + 2 * difficulty + 1
        has_facts = self.facts == "prompt"
        return self.tokens(self.sentences * _LONGEST + self.questions * question if has_facts else question)

    def n_steps(self, difficulty: int) -> int:
        return 2 * difficulty + 1

    def batch(self, n: int, difficulty: int, generator: torch.Generator | None = None) -> Batch:
        test, said = self.split != "train", []
        if self.facts == "weights":
            name, of = (part.expand(n, *part.shape) for part in self._learned)
            which = torch.arange(self.relations).expand(n, -1)
            path, way = self._unseen(of, difficulty, test, generator)
        else:
            low = self.sentences if test else self.min_sentences
            total = int(torch.randint(low, self.sentences + 1, (), generator=generator))
            each, owners, others = self.relations, total // self.relations, 0
            share = _ONE_DECIDES if self._size < _BOTH_DECIDE else 0.2 * _ONE_DECIDES
            if not test and torch.rand((), generator=generator) < share:
                difficulty, each, owners, others = 1, 1, min(total, _MOST), 0
                if torch.rand((), generator=generator) < 0.5:
                    owners, each, others = 2, min(total // 2, len(RELATIONS)), _OTHERS
            name, of = self._people(n, owners, each, others, test, generator)
            which = torch.rand(n, len(RELATIONS), generator=generator).argsort(1)[:, :each]
            facts, known = self._said(name, of, which, test, generator)
            said.append(facts)
            asked = torch.rand(n, max(owners, self.questions), generator=generator).argsort(1)[:, : self.questions]
            asked %= owners
            path, way = _walk(of, asked, difficulty, generator)
        n_questions, n_steps = path.shape[1], self.n_steps(difficulty)
        words = _FIRST_RELATION + which.gather(1, path.flatten(1)).view_as(path)
        people = name.gather(1, way.flatten(1)).view_as(way)
        asks = ASKS.sentences(people[..., 0], [_FIRST_NAME + people[..., 0]], test, generator)
        on_path = torch.stack([torch.full_like(words, ID["'s"]), words], 3).flatten(2)
        said.append(torch.cat([asks, on_path, torch.full_like(words[..., :1], ID["?"])], 2))
        ids, valid, ends = joined(said)
        ends, asked_at = ends.split([ends.shape[1] - n_questions, n_questions], 1)
        # targets at the name and each relation of every question: the person found; one loop before, the person that
        # the relation is about; and until then the relation itself, so that all wait alike, however long
        hops = torch.arange(difficulty + 1)[:, None]
        on_path, path = asked_at[:, None] - 1 - 2 * (difficulty - hops), _FIRST_NAME + people.mT
        found = from_loop((2 * hops - 1).clamp(min=0).expand_as(path), path, n_steps)
        for hop in range(difficulty):
            found[:, hop + 1, :, 2 * hop] = path[:, hop]
            found[:, hop + 1, :, : 2 * hop] = words[:, :, hop, None]
        answer = from_loop(torch.full_like(asked_at, n_steps - 1), path[:, -1], n_steps)
        steps, places = torch.cat([found.flatten(1, 2), answer], 1), torch.cat([on_path.flatten(1), asked_at], 1)
        if self.facts == "prompt":
            places = torch.cat([ends, places], 1)
            steps = torch.cat([known[..., None].expand(-1, -1, n_steps), steps], 1)
        return self.told(problems(ids, valid, places, steps, n_questions))

    @cached_property
    def _learned(self) -> tuple[Tensor, Tensor]:
        """Index in ``NAMES`` of each person, (people,), and whom their relations lead to, (people, relations)."""
        generator = torch.Generator().manual_seed(self.seed)
        of = torch.empty(self.people, self.relations, dtype=torch.long)
        for i in range(self.relations):  # everybody is the target of each relation once
            circle = torch.randperm(self.people, generator=generator)
            of[circle, i] = circle.roll(1)
        return torch.randperm(len(NAMES), generator=generator)[: self.people], of

    def _unseen(self, of: Tensor, hops: int, test: bool, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Draw one path of the split for each problem; returns as :func:`_walk`."""
        n, people, _ = of.shape
        path, way = torch.empty(n, 1, hops, dtype=torch.long), torch.empty(n, 1, hops + 1, dtype=torch.long)
        rows = torch.arange(n)
        while len(rows):
            asked = torch.randint(0, people, (len(rows), 1), generator=generator)
            path[rows], way[rows] = _walk(of[rows], asked, hops, generator)
            mixed = asked
            for hop in path[rows].unbind(2):
                mixed = (mixed * 12 + hop + 1) * 48271 % 2147483647
            for_test = mixed.squeeze(1) // 64 % 4 == 0
            rows = rows[(for_test != test) & (hops > 1)]
        return path, way

    def _people(
        self, n: int, people: int, each: int, others: int, test: bool, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Names of people and ``others``, and whom the relations of the former lead to, (n, people, each)."""
        every = people + others
        name, rows = torch.empty(n, every, dtype=torch.long), torch.arange(n)
        while len(rows):
            name[rows] = torch.rand(len(rows), len(NAMES), generator=generator).argsort(1)[:, :every]
            partners = may_pair(test)[name[rows, :, None], name[rows, None]].sum(2)
            rows = rows[partners.amin(1) < _PARTNERS]
        may = may_pair(test)[name[:, :, None], name[:, None]]
        of = torch.empty(n, people, each, dtype=torch.long)
        taken = torch.zeros(n, every, every)  # how often each person's relations lead to each other
        for i in range(people * each):
            who, which = i % people, i // people
            # somebody new to this person if possible, and among those one with the fewest relations leading there
            chance = torch.rand(n, every, generator=generator) - every * taken[:, who] * each - taken.sum(1)
            of[:, who, which] = one = chance.masked_fill(~may[:, who], -math.inf).argmax(1)
            taken[torch.arange(n), who, one] += 1
        return name, of

    def _said(
        self, name: Tensor, of: Tensor, which: Tensor, test: bool, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """The facts in random order, (n, people * each, width), and whom each leads to, tokens (n, people * each)."""
        whose = name[:, : of.shape[1], None].expand_as(of).flatten(1)
        who = name.gather(1, of.flatten(1))
        words = [_FIRST_NAME + whose, _FIRST_NAME + who, _FIRST_RELATION + which.repeat(1, of.shape[1])]
        facts = FACTS.sentences(whose, words, test, generator)
        order = torch.rand(who.shape, generator=generator).argsort(1)
        return facts.gather(1, order[..., None].expand_as(facts)), words[1].gather(1, order)


def _walk(of: Tensor, start: Tensor, hops: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Draw random paths that do not go straight back.

    Args:
        of: (n, people, R) whom the relations of each person lead to.
        start: (n, Q) the first people.

    Returns:
        The relations on the paths, (n, Q, hops), and the people, (n, Q, hops + 1).
    """
    path, way = [], [start, start]
    for _ in range(hops):
        onward = of.gather(1, way[-1][..., None].expand(-1, -1, of.shape[2]))
        chance = torch.rand(onward.shape, generator=generator).masked_fill(onward == way[-2][..., None], -1)
        path.append(chance.argmax(2))
        way.append(onward.gather(2, path[-1][..., None]).squeeze(2))
    return torch.stack(path, 2), torch.stack(way[1:], 2)
