"""p-hop induction: look up what follows, then what follows that, p times over."""

from __future__ import annotations

import string
from dataclasses import dataclass

import torch

from open_mythos.fields import must, size
from open_mythos.tasks.base import UNSCORED, Batch, Task


@dataclass
class PHop(Task):
    """A random cycle through all symbols, to be walked ``difficulty`` hops from random starts.

    The prompt lists every symbol and its successor, as two tokens "a> c", in random order. Then come ``questions``, all
    of different starts: a start, and a mark ``?`` for each hop; the k-th mark is to be answered with the k-th successor
    of the start. An induction head finds one successor; p hops chain p of them.

    After p-hop induction of Sanford et al. (2402.09268), where a hop goes from the last token of a text to what
    followed its latest earlier occurrence, so hops only ever go back in time and only the last one is asked. Here pairs
    stand in random order, so hops go both ways; a symbol that has a successor beside it is a token of its own, so that
    both roles can be told apart; and every hop is asked.

    Token 1 + i is symbol i, token 1 + symbols + i the same with its successor beside it, 1 + 2 symbols is ``?``.
    """

    name = "p_hop"
    unit = "hops"
    symbols: int = size(16, minimum=3)
    questions: int = size(1)  # of each problem

    def __post_init__(self) -> None:
        super().__post_init__()
        must(
            self.questions <= self.symbols,
            f"questions={self.questions}, but there are only {self.symbols} starts; use at most {self.symbols}",
        )
        letters = string.ascii_lowercase
        named = letters[: self.symbols] if self.symbols <= len(letters) else [f"s{i}" for i in range(self.symbols)]
        self.vocab = ("<pad>", *named, *(f"{name}>" for name in named), "?")
        self.most = self.symbols - 1  # one more and the walk is back at its start
        self.chance = 1 / (self.symbols - 1)  # any symbol but the start

    def length(self, difficulty: int) -> int:
        return 2 * self.symbols + self.questions * (1 + difficulty)

    def batch(self, n: int, difficulty: int, generator: torch.Generator | None = None) -> Batch:
        self.check(difficulty)
        cycle, order, starts = torch.rand(3, n, self.symbols, generator=generator).argsort(-1)
        pairs = torch.stack([cycle + 1 + self.symbols, cycle.roll(-1, 1) + 1], 2)
        pairs = pairs.gather(1, order[..., None].expand(-1, -1, 2)).flatten(1)

        # places on the cycle: (n, questions, 1 + difficulty), the start and each hop from it
        places = starts[:, : self.questions, None] + torch.arange(difficulty + 1)
        walks = cycle.gather(1, (places % self.symbols).flatten(1)).view(places.shape) + 1
        asked, answers = walks.clone(), walks
        asked[..., 1:] = self.vocab_size - 1
        answers[..., 0] = UNSCORED
        unscored = torch.full_like(pairs, UNSCORED)
        return Batch(torch.cat([pairs, asked.flatten(1)], 1), torch.cat([unscored, answers.flatten(1)], 1))
