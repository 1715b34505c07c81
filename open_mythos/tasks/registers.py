"""Short programs in words: what does a register hold at the end?"""

from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.fields import choice, must, size
from open_mythos.tasks.base import UNSCORED, Batch
from open_mythos.tasks.english import (
    ALL_KINDS,
    CHAINS,
    ID,
    NUMBERS,
    REGISTERS,
    InWords,
    Patterns,
    chosen,
    joined,
    numbers,
    sentence_of,
)


@cache
def _programs(n: int, letters: int, split: str) -> Tensor:
    """All choices of ``n`` of the first ``letters`` registers, (choices, n), where each has a partner for a line."""
    every = torch.tensor(list(combinations(range(letters), n)))  # torch.combinations makes letters**n tuples first
    together = _TOGETHER[split][every[:, :, None], every[:, None, :]]
    return every[together.any(2).all(1)]


def _lines(*patterns: str) -> Patterns:
    return Patterns(*patterns, names=REGISTERS)


SET = _lines("set {0} to {1} .", "let {0} have {1} .", "put {1} in {0} .", "write {1} to {0} .")
ADD = _lines("add {1} to {0} .", "increase {0} by {1} .", "let {0} increase by {1} .", "put {0} plus {1} in {0} .")
SUBTRACT = _lines(
    "subtract {1} from {0} .", "decrease {0} by {1} .", "take {1} from {0} .", "put {0} minus {1} in {0} ."
)
SWAP = _lines("{0} and {1} swap .", "let {0} and {1} swap .", "now {0} and {1} swap .", "{0} and {1} swap values .")
IF = _lines(
    "if {1} is more than {2} , add {3} to {0} .", "add {3} to {0} if {1} is more than {2} .",
    "if {1} holds more than {2} , increase {0} by {3} .", "increase {0} by {3} if {1} holds more than {2} .",
)  # fmt: skip
ASKS = _lines("what is {0} ?", "what is in {0} ?", "what does {0} hold ?", "{0} is what ?")

_KINDS = (SET, ADD, SUBTRACT, SWAP, IF)
_SET, _SWAP, _IF = 0, 3, 4
_OFTEN = torch.tensor([1.0, 3.0, 3.0, 1.5])  # relative frequency of kinds but IF; SET is rare, as it forgets a value
_KEPT = torch.tensor([1.0, 0.0, 0.0, 1.5])  # factor on these for the smallest programs: no kinds that change a number
_PLAIN = 0.4  # share of SET, ADD and SUBTRACT lines whose operand is a number, not a register
_FEW = 12  # lines of the smallest programs (Task.sized)
_EVERY = 3  # every third line may have a condition, which takes two steps
_CONDITIONS = 0.45  # share of these lines that have one
_NEVER = -9  # depth (steps until its value is known) of a register that was not set yet
_FIRST, _ZERO = ID[REGISTERS[0]], ID[NUMBERS[0]]
_LONGEST = max(kind.codes.shape[1] for kind in _KINDS)
_NUMBERS = torch.arange(len(REGISTERS))
_APART = (_NUMBERS[:, None] - _NUMBERS).abs()
_FOR_TEST = _APART % 3 == 1
_TOGETHER = {"train": ~_FOR_TEST & (_APART > 0), "held_out": _FOR_TEST}  # which two may occur in one line


class _Lines(NamedTuple):
    """The effects of lines, (n, L, 2) each, on two registers per line: the one it writes, and its operand.

    Attributes:
        named: the two; the operand need not occur in the line.
        held, since: their values before the line, and the steps in a row after which these are known.
        holds, due: their values after the line, and the steps in a row after which these are known.
        true: whether their values before the line are above its limit.
    """

    named: Tensor
    held: Tensor
    since: Tensor
    holds: Tensor
    due: Tensor
    true: Tensor


@dataclass
class Registers(InWords):
    """Lines that set, add, subtract or swap registers, or add if another one holds enough; all modulo ``modulus``.

    ``set A to 3 . set C to 0 . set D to 1 . set B to 5 . add C to A . D and A swap . what is D ?`` is a problem of two
    lines: in every split, the lines at the start, which set all registers, do not count.

    Step targets at each register in a line are first its name, and then its value before the line; at the line's end,
    first the name of the register it writes, and then that one's new value. A line that swaps writes two; the one it
    names last has its targets at the word ``swap``. A written value is known after one loop if the line reads nothing,
    otherwise one loop after the values it reads: in one loop the registers look up, each by itself, the value last
    written to them, and then the end of the line calculates with what is in the line, which takes two layers. A
    condition is a step of its own: the target at its limit is ``so`` or ``not``, and the result is known at the line's
    end a loop later; one line in three may have one. The answer, the only final target, is known a loop later still.

    Pairs of registers that occur in one line of the held-out split (one, four or seven apart in the alphabet), pairings
    of a written register with a pattern, and so all its lines, never occur in training.

    Attributes:
        registers: number in a program; with fewer than four, some could occur with no other.
        letters: number of registers, from A on, that programs draw from. With few, a model learns each pair and pattern
            separately, and fails on those that training did not have.
        lines: maximum number in a program.
        modulus: of all numbers.
        split: ``"train"`` or ``"held_out"``.
    """

    name = "registers"
    version = 4
    unit = "lines"
    has_steps = True
    registers: int = size(5, minimum=4, maximum=len(REGISTERS))
    letters: int = size(len(REGISTERS), minimum=4, maximum=len(REGISTERS))
    lines: int = size(32)
    modulus: int = size(7, minimum=5, maximum=len(NUMBERS))
    split: str = choice("train", "train", "held_out")

    def __post_init__(self) -> None:
        super().__post_init__()
        few = f"registers={self.registers} is above letters={self.letters}; use fewer registers or more letters"
        must(self.registers <= self.letters, few)
        self.chance = 1 / self.modulus
        self.most = self.lines
        self._size = 1.0

    def sized(self, size: float) -> Self:
        few = min(_FEW, self.lines)
        task = replace(self, lines=few + int((self.lines - few) * size))
        task._size = size
        return task

    def length(self, difficulty: int) -> int:
        return self.tokens(self.registers * SET.codes.shape[1] + difficulty * _LONGEST + ASKS.codes.shape[1])

    def n_steps(self, difficulty: int) -> int:
        return difficulty + difficulty // _EVERY + 3

    def batch(self, n: int, difficulty: int, generator: torch.Generator | None = None) -> Batch:
        test = self.split != "train"
        often = _OFTEN if self._size >= ALL_KINDS else _OFTEN * _KEPT
        kind = torch.multinomial(often, n * difficulty, replacement=True, generator=generator).view(n, difficulty)
        conditional = (torch.arange(difficulty) % _EVERY == _EVERY - 1) & (self._size >= ALL_KINDS)
        kind = kind.masked_fill(conditional & (torch.rand(n, difficulty, generator=generator) < _CONDITIONS), _IF)
        plain = (torch.rand(n, difficulty, generator=generator) < _PLAIN) & (kind < _SWAP)
        programs = _programs(self.registers, self.letters, self.split)
        register = programs[torch.randint(0, len(programs), (n,), generator=generator)]
        to = register.gather(1, torch.randint(0, self.registers, (n, difficulty), generator=generator))
        may = _TOGETHER[self.split][to[..., None], register[:, None]]
        other = torch.multinomial(may.flatten(0, 1).float(), 1, generator=generator).view(n, difficulty)
        other = register.gather(1, other)
        in_any_order = torch.rand(n, self.registers, generator=generator).argsort(1)
        first = register.gather(1, in_any_order)  # each is set to a number
        kind, to, other = (
            torch.cat([start, then], 1) for start, then in ((first * 0, kind), (first, to), (first, other))
        )
        plain = torch.cat([first >= 0, plain], 1)
        top = numbers(self._size, self.modulus)
        number = torch.randint(0, top, kind.shape, generator=generator)
        limit = torch.randint(1, max(top - 2, 2), kind.shape, generator=generator)  # half of all numbers exceed it
        lines, value, depth = self._run(kind, plain, to, other, number, limit)
        asked = torch.multinomial((depth**2 + 0.01) * (depth >= 0), 1, generator=generator)
        value, depth = value.gather(1, asked), depth.gather(1, asked)
        words = [_FIRST + to, torch.where(plain, _ZERO + number, _FIRST + other), _ZERO + limit, _ZERO + number]
        said = chosen(kind, [patterns.sentences(to, words, test, generator) for patterns in _KINDS])
        ids, valid, ends = joined([said, ASKS.sentences(asked, [_FIRST + asked], test, generator)])
        # the question is a line that reads a register, with its value at the end, and without a condition
        told_of = asked, value, depth, value, depth + 1, asked < 0
        question = _Lines(*(torch.stack([of, of], 2) for of in told_of))
        told = _Lines(*(torch.cat(both, 1) for both in zip(lines, question, strict=True)))
        targets = torch.full_like(ids, UNSCORED).scatter_(1, ends[:, -1:], _ZERO + value)
        return self.told(Batch(ids, targets, valid, _steps(ids, ends, told, self.n_steps(difficulty))))

    def _run(
        self, kind: Tensor, plain: Tensor, to: Tensor, other: Tensor, number: Tensor, limit: Tensor
    ) -> tuple[_Lines, Tensor, Tensor]:
        """Run programs: the effects of lines, and each register's final value and its depth in steps, (n, 8) each.

        In place, lines with operands too deep for the size become plain SET, and numbers to add at least 1, (n, L).
        """
        value = torch.zeros(len(kind), len(REGISTERS), dtype=torch.long)
        depth, lines = torch.full_like(value, _NEVER), list[_Lines]()
        keeps = (kind == _SET) | (kind == _SWAP)
        for i in range(kind.shape[1]):
            both = torch.stack([to[:, i], other[:, i]], 1)
            held, since = value.gather(1, both), depth.gather(1, both)
            is_set, constant = kind[:, i] == _SET, plain[:, i]
            unread = torch.stack([is_set, constant], 1)
            if self._size < CHAINS:
                deep = (since.masked_fill(unread, -1).amax(1) > 0) & ~keeps[:, i]
                is_set, constant = is_set | deep, constant | deep
                kind[:, i], plain[:, i] = torch.where(is_set, _SET, kind[:, i]), constant
                unread = torch.stack([is_set, constant], 1)
            ready = torch.stack([since[:, 0], since[:, 1] + (kind[:, i] == _IF)], 1)
            read = ready.masked_fill(unread, -1).amax(1)
            number[:, i] = c = torch.where(is_set, number[:, i], number[:, i].clamp(min=1))
            was, that = held.unbind(1)
            operand = torch.where(constant, c, that)
            true = held > limit[:, i, None]
            may = [operand, was + operand, was - operand, that, was + c * true[:, 1]]
            written = torch.stack(may).gather(0, kind[None, :, i])[0] % self.modulus
            swaps = kind[:, i] == _SWAP
            now, due = torch.stack([written, torch.where(swaps, was, that)], 1), torch.stack([read + 1, since[:, 1]], 1)
            due[:, 1] = torch.where(swaps, due[:, 0], due[:, 1])
            lines.append(_Lines(both, held, since, now, due, true))
            # the written register comes last, since both are the same one in lines of the start
            value.scatter_(1, both[:, 1:], now[:, 1:]).scatter_(1, both[:, :1], now[:, :1])
            depth.scatter_(1, both[:, 1:], due[:, 1:]).scatter_(1, both[:, :1], due[:, :1])
        return _Lines(*(torch.stack(of, 1) for of in zip(*lines, strict=True))), value, depth


def _steps(ids: Tensor, ends: Tensor, lines: _Lines, n_steps: int) -> Tensor:
    """Step targets after 0, 1, ... loops at registers, limits and ends of lines, (n, T, ``n_steps``).

    Args:
        ids, ends: (n, T) tokens, and the position of the last one of each of ``lines``, (n, L), the question last.
    """
    line, is_end = sentence_of(ids, ends)
    named, held, since, holds, due, true = (of.gather(1, line[..., None].expand(-1, -1, 2)) for of in lines)
    writes = is_end | (ids == ID["swap"])
    is_limit = F.pad(ids[:, :-1] == ID["than"], (1, 0))
    is_register = (ids >= _FIRST) & (ids < _FIRST + len(REGISTERS))
    second = torch.where(is_register, ids != _FIRST + named[..., 0], ~is_end).long()[..., None]
    number = _ZERO + torch.where(writes[..., None], holds, held)
    said = torch.where(is_limit[..., None], torch.where(true, ID["so"], ID["not"]), number).gather(2, second)
    loops = torch.where(writes[..., None], due + 1, since + 2).gather(2, second)
    steps = torch.where(torch.arange(n_steps) < loops, _FIRST + named.gather(2, second), said)
    return steps.masked_fill(~(is_register | writes | is_limit)[..., None] | (loops < 0), UNSCORED)
