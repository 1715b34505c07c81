"""p-hop induction: follow successors p times."""

import string
from dataclasses import dataclass

import torch

from open_mythos.fields import must, size
from open_mythos.tasks.base import UNSCORED, Batch, Task


@dataclass
class PHop(Task):
    """A random cycle through all symbols, walked for ``difficulty`` hops from random starts.

    The prompt lists every symbol and its successor, as two tokens "a> c", in random order. Then come ``questions``
    with different starts: a start and a ``?`` for each hop; the target at the k-th ``?`` is the k-th successor of the
    start. An induction head finds one successor; p hops chain p of them.

    Adapted from the p-hop induction of Sanford et al. (2402.09268), where a hop goes from the last token to what
    followed its latest earlier occurrence, so hops only go back in time and only the last one is scored. Here pairs
    are shuffled, so hops go both ways; a symbol in the first place of a pair has a token of its own; and every hop is
    scored.

    Token 1 + i is symbol i, token 1 + symbols + i is symbol i as the first of a pair, 1 + 2 symbols is ``?``.
    """

    name = "p_hop"
    unit = "hops"
    symbols: int = size(16, minimum=3)
    questions: int = size(1)  # per problem

    def __post_init__(self) -> None:
        super().__post_init__()
        most = f"there are only {self.symbols} symbols to start from; use at most {self.symbols}"
        must(self.questions <= self.symbols, f"questions={self.questions}, but {most}")
        letters = string.ascii_lowercase
        named = letters[: self.symbols] if self.symbols <= len(letters) else [f"s{i}" for i in range(self.symbols)]
        self.vocab = ("<pad>", *named, *(f"{name}>" for name in named), "?")
        self.most = self.symbols - 1  # one more hop returns to the start
        self.chance = 1 / (self.symbols - 1)  # any symbol except the start

    def length(self, difficulty: int) -> int:
        return 2 * self.symbols + self.questions * (1 + difficulty)

    def batch(self, n: int, difficulty: int, generator: torch.Generator | None = None) -> Batch:
        cycle, order, starts = torch.rand(3, n, self.symbols, generator=generator).argsort(-1)
        pairs = torch.stack([cycle + 1 + self.symbols, cycle.roll(-1, 1) + 1], 2)
        pairs = pairs.gather(1, order[..., None].expand(-1, -1, 2)).flatten(1)

        # positions on the cycle: (n, questions, 1 + difficulty), the start and each hop from it
        positions = starts[:, : self.questions, None] + torch.arange(difficulty + 1)
        answers = cycle.gather(1, (positions % self.symbols).flatten(1)).view(positions.shape) + 1
        questions = answers.clone()
        questions[..., 1:] = self.vocab_size - 1
        answers[..., 0] = UNSCORED
        unscored = torch.full_like(pairs, UNSCORED)
        return Batch(torch.cat([pairs, questions.flatten(1)], 1), torch.cat([unscored, answers.flatten(1)], 1))
