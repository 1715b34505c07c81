"""What a register holds at the end of a short program in words."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from open_mythos.fields import choice, size
from open_mythos.tasks.base import Batch, Task
from open_mythos.tasks.english import ID, NUMBERS, REGISTERS, VOCABULARY, Patterns, chosen, from_loop, joined, problems


def _lines(*patterns: str) -> Patterns:
    return Patterns(*patterns, names=REGISTERS)


SET = _lines("set {0} to {1} .", "let {0} have {1} .", "put {1} in {0} .", "write {1} to {0} .")
ADD = _lines("add {1} to {0} .", "increase {0} by {1} .", "let {0} increase by {1} .", "put {0} plus {1} in {0} .")
SUBTRACT = _lines(
    "subtract {1} from {0} .", "decrease {0} by {1} .", "take {1} from {0} .", "put {0} minus {1} in {0} ."
)
SWAP = _lines("swap {0} and {1} .", "swap {0} with {1} .", "let {0} and {1} swap .", "let {0} swap with {1} .")
IF = _lines(
    "if {1} is more than {2} , add {3} to {0} .", "add {3} to {0} if {1} is more than {2} .",
    "if {1} holds more than {2} , increase {0} by {3} .", "increase {0} by {3} if {1} holds more than {2} .",
)  # fmt: skip
ASKS = _lines("what is {0} ?", "what is in {0} ?", "what does {0} hold ?", "{0} is what ?")

_KINDS = (SET, ADD, SUBTRACT, SWAP, IF)
_SET, _SWAP = 0, 3
_OFTEN = torch.tensor([1.0, 3.0, 3.0, 1.5, 1.5])  # how often lines are of each kind: few forget what was before
_PLAIN = 0.25  # share of the lines that set, add or subtract a number, not a register
_FIRST, _ZERO = ID[REGISTERS[0]], ID[NUMBERS[0]]
_LONGEST = max(kind.codes.shape[1] for kind in _KINDS)
_NUMBERS = torch.arange(len(REGISTERS))
_APART = (_NUMBERS[:, None] - _NUMBERS).abs()
_FOR_TEST = _APART % 3 == 1


@dataclass
class Registers(Task):
    """Lines that set, add, subtract or swap registers, or add if another one holds enough; all modulo ``modulus``.

    ``set A to 3 . set C to 0 . set D to 1 . set B to 5 . add C to A . swap D and A . what is D ?`` is a problem of two
    lines: those at the start, which set all registers, do not count, in no split. The steps at the end of a line are
    what the register holds that it writes, the first one named if it swaps two. They are known after as many steps as
    the longest chain of lines up to it, each of which reads what the one before it wrote. What the register holds
    that is asked for, the only target, is known a step later.

    Registers that stand together in a line of the held-out split (one, four or seven apart in the alphabet), registers
    written and patterns that do, and so all its lines, are never together in training.

    Attributes:
        registers: of a program, from A on; with fewer than four, some would stand with no other.
        lines: of a program, the most.
        modulus: what numbers are counted modulo.
        split: ``"train"`` or ``"held_out"``.
    """

    name = "registers"
    unit = "lines"
    has_steps = True
    vocab = VOCABULARY
    registers: int = size(5, minimum=4, maximum=len(REGISTERS))
    lines: int = size(32)
    modulus: int = size(7, minimum=5, maximum=len(NUMBERS))
    split: str = choice("train", "train", "held_out")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.chance = 1 / self.modulus
        self.most = self.lines

    def sized(self, size: float) -> Self:
        return replace(self, lines=1 + int((self.lines - 1) * size))

    def length(self, difficulty: int) -> int:
        return self.registers * SET.codes.shape[1] + difficulty * _LONGEST + ASKS.codes.shape[1]

    def n_steps(self, difficulty: int) -> int:
        return difficulty + 2

    def batch(self, n: int, difficulty: int, generator: torch.Generator | None = None) -> Batch:
        test = self.split != "train"
        kind = torch.multinomial(_OFTEN, n * difficulty, replacement=True, generator=generator).view(n, difficulty)
        plain = (torch.rand(n, difficulty, generator=generator) < _PLAIN) & (kind < _SWAP)
        to = torch.randint(0, self.registers, (n, difficulty), generator=generator)
        together = _FOR_TEST if test else ~_FOR_TEST & (_APART > 0)
        may = together[: self.registers, : self.registers][to].flatten(0, 1).float()
        other = torch.multinomial(may, 1, generator=generator).view(n, difficulty)
        first = torch.rand(n, self.registers, generator=generator).argsort(1)  # in any order, each is set to a number
        kind, to, other = (
            torch.cat([start, then], 1) for start, then in ((first * 0, kind), (first, to), (first, other))
        )
        plain = torch.cat([first >= 0, plain], 1)
        number = torch.randint(0, self.modulus, kind.shape, generator=generator)
        number = torch.where(kind == _SET, number, number.clamp(min=1))
        limit = torch.randint(1, self.modulus - 2, kind.shape, generator=generator)  # half of all numbers are more
        value, due, holds, depth = self._run(kind, plain, to, other, number, limit)
        asked = torch.multinomial(depth**2 + 0.01, 1, generator=generator)
        words = [_FIRST + to, torch.where(plain, _ZERO + number, _FIRST + other), _ZERO + limit, _ZERO + number]
        said = chosen(kind, [patterns.sentences(to, words, test, generator) for patterns in _KINDS])
        ids, valid, ends = joined([said, ASKS.sentences(asked, [_FIRST + asked], test, generator)])
        value, due = torch.cat([value, holds.gather(1, asked)], 1), torch.cat([due, depth.gather(1, asked) + 1], 1)
        return problems(ids, valid, ends, from_loop(due, _ZERO + value, difficulty + 2), 1)

    def _run(
        self, kind: Tensor, plain: Tensor, to: Tensor, other: Tensor, number: Tensor, limit: Tensor
    ) -> tuple[Tensor, ...]:
        """What each line writes and how many steps it takes, (n, lines); both of each register in the end, (n, R)."""
        holds = torch.zeros(len(kind), self.registers, dtype=torch.long)
        depth, value, due = holds.clone(), torch.empty_like(kind), torch.empty_like(kind)
        for i in range(kind.shape[1]):
            line, this, that, constant = kind[:, i, None], to[:, i, None], other[:, i, None], plain[:, i, None]
            was, read, new = holds.gather(1, this), holds.gather(1, that), number[:, i, None]
            operand = new.where(constant, read)
            if_more = was + new * (read > limit[:, i, None])
            written = torch.stack([operand, was + operand, was - operand, read, if_more]).gather(0, line[None])[0]
            written %= self.modulus
            after = torch.maximum(
                depth.gather(1, this).masked_fill(line == _SET, -1), depth.gather(1, that).masked_fill(constant, -1)
            )
            after += 1
            swaps = line == _SWAP
            holds.scatter_(1, that, was.where(swaps, read)).scatter_(1, this, written)
            depth.scatter_(1, that, after.where(swaps, depth.gather(1, that))).scatter_(1, this, after)
            value[:, i], due[:, i] = written[:, 0], after[:, 0]
        return value, due, holds, depth
