"""What a register holds at the end of a short program in words."""

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
    """Every choice of ``n`` registers of so many, (choices, n), of which each may stand in a line with another."""
    every = torch.tensor(list(combinations(range(letters), n)))  # torch's makes letters**n tuples first
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
_OFTEN = torch.tensor([1.0, 3.0, 3.0, 1.5])  # how often lines are of each kind but the last: few forget what was before
_KEPT = torch.tensor([1.0, 0.0, 0.0, 1.5])  # those of kinds that change no number
_PLAIN = 0.4  # share of the lines that set, add or subtract a number, not a register
_FEW = 12  # lines of the smallest programs (Task.sized)
_EVERY = 3  # of so many lines the last may have a condition, which takes two steps
_CONDITIONS = 0.45  # share of those lines that have one
_NEVER = -9  # after how many lines a register holds what it holds, if it was not set yet
_FIRST, _ZERO = ID[REGISTERS[0]], ID[NUMBERS[0]]
_LONGEST = max(kind.codes.shape[1] for kind in _KINDS)
_NUMBERS = torch.arange(len(REGISTERS))
_APART = (_NUMBERS[:, None] - _NUMBERS).abs()
_FOR_TEST = _APART % 3 == 1
_TOGETHER = {"train": ~_FOR_TEST & (_APART > 0), "held_out": _FOR_TEST}  # which two may stand in one line


class _Lines(NamedTuple):
    """Lines, (n, L) each, with the two registers that each names, (n, L, 2): one that it writes, and one more.

    Attributes:
        named: the two; the other one need not be in the line.
        held, since: what the two held before, and after how many lines, one after the other.
        holds, due: what they hold then, and after how many lines.
        true: whether the two held more than the line's limit.
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
    lines: those at the start, which set all registers, do not count, in no split.

    Its steps are at every register that a line names: which it is, and then what it held before; and at the line's end:
    which register it writes, and then what that holds now. A line that swaps writes two, and says the one that it names
    last at the word ``swap``. What a line writes is known after one loop if it reads nothing, and a loop after what it
    reads if it does: in one loop its registers look up, each by itself, what was last written to them, and then the end
    calculates with what stands in its line, which takes two layers. A condition is a step of its own: its limit says
    ``so`` or ``not``, and the end of the line what that comes to a loop later; one line in three may have one. What the
    register holds that is asked for, the only target, is found a loop later still.

    Registers that stand together in a line of the held-out split (one, four or seven apart in the alphabet), registers
    written and patterns that do, and so all its lines, are never together in training.

    Attributes:
        registers: of a program; with fewer than four, some would stand with no other.
        letters: how many there are, from A on, of which a program has any. Of a few pairs and patterns a model learns
            each by itself, and fails on those that training did not have.
        lines: of a program, the most.
        modulus: what numbers are counted modulo.
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
        few = f"registers={self.registers} of a program, of letters={self.letters}; use fewer registers or more letters"
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
        limit = torch.randint(1, max(top - 2, 2), kind.shape, generator=generator)  # half of all numbers are more
        lines, value, depth = self._run(kind, plain, to, other, number, limit)
        asked = torch.multinomial((depth**2 + 0.01) * (depth >= 0), 1, generator=generator)
        value, depth = value.gather(1, asked), depth.gather(1, asked)
        words = [_FIRST + to, torch.where(plain, _ZERO + number, _FIRST + other), _ZERO + limit, _ZERO + number]
        said = chosen(kind, [patterns.sentences(to, words, test, generator) for patterns in _KINDS])
        ids, valid, ends = joined([said, ASKS.sentences(asked, [_FIRST + asked], test, generator)])
        # the question reads a register as lines do, and says at its end what that holds
        told_of = asked, value, depth, value, depth + 1, asked < 0  # and has no condition
        question = _Lines(*(torch.stack([of, of], 2) for of in told_of))
        told = _Lines(*(torch.cat(both, 1) for both in zip(lines, question, strict=True)))
        targets = torch.full_like(ids, UNSCORED).scatter_(1, ends[:, -1:], _ZERO + value)
        return self.told(Batch(ids, targets, valid, _steps(ids, ends, told, self.n_steps(difficulty))))

    def _run(
        self, kind: Tensor, plain: Tensor, to: Tensor, other: Tensor, number: Tensor, limit: Tensor
    ) -> tuple[_Lines, Tensor, Tensor]:
        """What lines do, and what each register holds in the end and after how many, (n, 8) each.

        Changes, (n, L) each: lines that would read too much to plain ones that set, and number to what lines say.
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
            # the one that is written at last: where the start sets a register, both are that
            value.scatter_(1, both[:, 1:], now[:, 1:]).scatter_(1, both[:, :1], now[:, :1])
            depth.scatter_(1, both[:, 1:], due[:, 1:]).scatter_(1, both[:, :1], due[:, :1])
        return _Lines(*(torch.stack(of, 1) for of in zip(*lines, strict=True))), value, depth


def _steps(ids: Tensor, ends: Tensor, lines: _Lines, n_steps: int) -> Tensor:
    """What is known after 0, 1, ... loops at registers and ends of lines, (n, T, ``n_steps``).

    Args:
        ids, ends: (n, T) tokens, and the places of the last ones of ``lines``, (n, L), the question's at last.
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
