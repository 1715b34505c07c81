"""Chains of assignments in words: who has what, where most people have what somebody else has."""

from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.fields import choice, must, size
from open_mythos.tasks.base import UNSCORED, Batch
from open_mythos.tasks.english import (
    ID,
    NAMES,
    THINGS,
    InWords,
    Patterns,
    chosen,
    joined,
    may_pair,
    named,
    padded,
    problems,
)

COPIES = Patterns("{0} has what {1} has .", "{0} copies {1} .", "what {1} has , {0} has .", "{0} is like {1} .")
HAS = Patterns("{0} has a {1} .", "{0} holds the {1} .", "the {1} is with {0} .", "{0} keeps a {1} .")
KNOWS = Patterns("{0} likes {1} .", "{0} lives near {1} .", "{0} is older than {1} .", "{1} knows {0} .")
ASKS = Patterns("what does {0} have ?", "{0} has what ?", "what has {0} ?", "what is with {0} ?")

_FIRST_NAME, _FIRST_THING = ID[NAMES[0]], ID[THINGS[0]]
_OTHERS = 4  # minimum number of sentences that no question needs; half of them are about people off all chains
_ALONE = 0.2  # share of the people off the asked chains who have a thing of their own


@dataclass
class Assignments(InWords):
    """Sentences in any order, each saying that one person has a thing, or has what another one has; then questions.

    ``Ana has what Ben has . Ben keeps a key . Cora likes Ana . what does Ana have ?`` is a problem of two hops. The
    target at the end of a question is the thing; its steps are the names on the way: Ana, Ben, key. Difficulty is the
    number of hops: of every scored question in the held-out split, of the longest in training. No question needs all
    sentences: some do not say what anybody has, some are about people off the chain that is asked about, whose things
    are copied as well, and some about people who copy from somebody on that chain.

    Pairs of names that occur in one sentence of the held-out split, pairings of a subject with a pattern, and so all
    its sentences, never occur in training.

    Attributes:
        sentences: maximum number in a problem, four more than the maximum number of hops.
        min_sentences: minimum number; each batch of training draws a number between the two.
        questions: maximum number in a problem; fewer where fewer people are that many hops from their thing.
        split: ``"train"`` or ``"held_out"``.
    """

    name = "assignments"
    version = 2
    unit = "hops"
    has_steps = True
    chance = 1 / len(THINGS)
    sentences: int = size(32)
    min_sentences: int = size(6, minimum=_OTHERS + 1)
    questions: int = size(8)
    split: str = choice("train", "train", "held_out")

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high, most = self.min_sentences, self.sentences, 2 * len(NAMES) // 3
        must(high <= most, f"sentences={high}; there are only {len(NAMES)} names, so use at most {most}")
        must(low <= high, f"min_sentences={low} is above sentences={high}; lower min_sentences or raise sentences")
        self.most = high - _OTHERS

    def sized(self, size: float) -> Self:
        return replace(self, sentences=self.min_sentences + int((self.sentences - self.min_sentences) * size))

    def length(self, difficulty: int) -> int:
        longest = max(patterns.codes.shape[1] for patterns in (COPIES, HAS, KNOWS))
        return self.tokens(self.sentences * longest + self.questions * ASKS.codes.shape[1])

    def batch(self, n: int, difficulty: int, generator: torch.Generator | None = None) -> Batch:
        test = self.split != "train"
        low = self.sentences if test else max(self.min_sentences, difficulty + _OTHERS)
        total = int(torch.randint(low, self.sentences + 1, (), generator=generator))
        n_noise = min(total // 8, total - difficulty - _OTHERS // 2)
        n_alone = min(_OTHERS // 2 + total // 8, total - n_noise - difficulty)
        source, hops_to = self._chains(n, total - n_noise - n_alone, difficulty, generator)
        # off the chains every second person copies the one before, so that being copied does not reveal who is asked
        alone = torch.arange(n_alone)
        is_copy, before = alone % 2 == 1, source.shape[1] + alone - 1
        source = torch.cat([source, before.where(is_copy, -1).expand(n, -1)], 1)
        hops_to = torch.cat([hops_to, (1 + is_copy.long()).expand(n, -1)], 1)
        asked, counts = self._asked(hops_to, difficulty, test, generator)
        links = F.one_hot(source + 1, source.shape[1] + 1)[..., 1:].bool()
        name = named(links, test, generator)
        thing = _FIRST_THING + torch.randint(0, len(THINGS), source.shape, generator=generator)
        of_source = name.gather(1, source.clamp(min=0))
        own = HAS.sentences(name, [_FIRST_NAME + name, thing], test, generator)
        copied = COPIES.sentences(name, [_FIRST_NAME + name, _FIRST_NAME + of_source], test, generator)
        said = [chosen((source >= 0).long(), [own, copied])]
        if n_noise:
            one, other = self._pairs(name, n_noise, test, generator)
            said.append(KNOWS.sentences(one, [_FIRST_NAME + one, _FIRST_NAME + other], test, generator))
        facts = torch.cat(padded(said), 1)
        order = torch.rand(n, total, generator=generator).argsort(1)
        facts = facts.gather(1, order[..., None].expand_as(facts))
        people = name.gather(1, asked)
        ids, valid, ends = joined([facts, ASKS.sentences(people, [_FIRST_NAME + people], test, generator)])
        known = self._known(source, name, thing, asked, difficulty).masked_fill(~counts[..., None], UNSCORED)
        return self.told(problems(ids, valid, ends[:, total:], known, asked.shape[1]))

    def _chains(self, n: int, people: int, hops: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Whom each of ``people`` copies, (n, people), -1 for none; and the number of hops to their thing, likewise.

        First come chains of ``hops`` people, each from its end on; then others, who copy an earlier person that copies
        too, or have a thing of their own.
        """
        on_chains = max(1, min(self.questions, people // hops)) * hops
        places = torch.arange(people)
        source = torch.where(places % hops == 0, -1, places - 1).repeat(n, 1)
        hops_to = (places % hops + 1).repeat(n, 1)
        for i in range(on_chains, people):
            copiers = (source[:, :i] >= 0) + 1e-6  # else the number of copies would reveal who has a thing
            joins = torch.multinomial(copiers, 1, generator=generator)
            alone = torch.rand(n, 1, generator=generator) < _ALONE
            source[:, i : i + 1] = joins.masked_fill(alone, -1)
            hops_to[:, i : i + 1] = (hops_to.gather(1, joins) + 1).masked_fill(alone, 1)
        return source, hops_to

    def _asked(
        self, hops_to: Tensor, hops: int, test: bool, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Subjects of questions, (n, Q), and whether they are scored: at ``hops`` hops, or in training at most that."""
        right = (hops_to == hops) if test else (hops_to <= hops)
        n = int(right.sum(1).clamp(max=self.questions).amax())
        chance = torch.rand(hops_to.shape, generator=generator)
        chance = torch.where(hops_to == 1, chance / 2, chance)  # most people have something of their own
        asked = (chance + right).argsort(1, descending=True)[:, :n]
        asked = asked.gather(1, torch.rand(asked.shape, generator=generator).argsort(1))
        return asked, right.gather(1, asked)

    def _pairs(self, name: Tensor, many: int, test: bool, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Pairs of names that may occur together, (n, many) each: the first, if possible both, from the problem."""
        n, people = name.shape
        one = name.gather(1, torch.randint(0, people, (n, many), generator=generator))
        here = torch.zeros(n, 1, len(NAMES)).scatter_(2, name[:, None], 1.0)
        weights = may_pair(test)[one].float() * (here + 1e-6)
        return one, torch.multinomial(weights.flatten(0, 1), 1, generator=generator).view(n, many)

    def _known(self, source: Tensor, name: Tensor, thing: Tensor, asked: Tensor, hops: int) -> Tensor:
        """Step targets of each question, known after 0, 1, ... hops, tokens (n, Q, hops + 1)."""
        known, at = [_FIRST_NAME + name.gather(1, asked)], asked
        for _ in range(hops):
            onward = source.gather(1, at)
            here = onward < 0
            at = onward.where(~here, at)
            known.append(torch.where(here, thing.gather(1, at), _FIRST_NAME + name.gather(1, at)))
        return torch.stack(known, 2)
