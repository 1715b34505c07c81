"""Common parts of the tasks in words: a vocabulary, sentences from patterns, and the split into training and test."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.fields import must, nearest, text
from open_mythos.tasks.base import UNSCORED, Batch, Task
from open_mythos.tasks.spelling import Spelling, spelling


def words(text: str) -> tuple[str, ...]:
    """The words of ``text``."""
    return tuple(text.split())


NAMES = words(
    "Ada Alma Ana Anton Basil Ben Bert Boris Carl Cecil Clara Cora Dan Dina Dirk Dora Edna Elsa Emil Emma Eva Fay "
    "Felix Finn Flora Fred Gail Gina Greta Gus Hans Heidi Hilda Hugo Ida Igor Irma Ivan Jack Jane Jonas Julia Kate Kim "
    "Klara Kurt Lars Lena Leo Liam Lukas Maria Mark Mia Mona Nadia Nils Nina Nora Olga Omar Oscar Otto Paul Petra Pia "
    "Quinn Ralf Rita Rosa Ruth Sam Sara Sven Tara Thea Tina Tom Ulla Uma Vera Vic Viola Walt Wanda Will Xena Yara Yves "
    "Zara Zeno Zita Zoe Bruno Celia Ned"
)
THINGS = words("ball bell book coin comb cup drum flag hat key lamp map pen ring rope shoe")
NUMBERS = tuple(map(str, range(23)))
RELATIONS = words("boss coach cook doctor friend guide lawyer neighbour rival teacher tenant uncle")
REGISTERS = words("A B C D E F G H")
_WORDS = words(
    "? . , : and a as add added also are asks bag by copies do does equals first from gets give gives had has have he "
    "her his hold holds how if in increased is it its keeps knows let like likes lives looks many matches minus more "
    "near no not now of older on or out plus put reads same says see sees set shares she so some stands subtract swap "
    "take than that the them then there they thing to together trusts twice up us was we what whatever who whose will "
    "with write writes zero increase decrease value values holding house left right less fewer between sum number "
    "before after end begin print each both coins 's"
)
PAD, END = "<pad>", "<end>"
ALL_KINDS = 0.16
"""Size of problems (``Task.sized``) from which all kinds of sentences occur; below it, none changes a number."""
CHAINS = 0.32
"""Size of problems from which results of a calculation enter another one; below it, they are at most copied."""
VOCABULARY = (PAD, END, *_WORDS, *NUMBERS, *RELATIONS, *REGISTERS, *THINGS, *NAMES)
"""Words of all tasks in words, so that one model can learn them together; a word is a token."""
ID = {word: i for i, word in enumerate(VOCABULARY)}
_ANSWERS = (*NUMBERS[:10], *RELATIONS, *REGISTERS, *THINGS, "so", "not")


@dataclass(kw_only=True)
class InWords(Task):
    """Base class of the tasks in words: a word is one token, or is spelled in the tokens of a pretrained model.

    Attributes:
        tokenizer: a folder with the ``tokenizer.json`` of a pretrained model, which encodes the problems; a run sets
            it to its ``start`` if that has one. "": a word is a token.
    """

    tokenizer: str = text("")

    def __post_init__(self) -> None:
        super().__post_init__()
        modulus, spelled = getattr(self, "modulus", 0), f"tokenizer={self.tokenizer!r} may split numbers into digits"
        must(not self.tokenizer or modulus <= 10, f"modulus={modulus}, but {spelled}; use at most 10")

    @property
    def spelling(self) -> Spelling | None:
        """How the model's tokens spell words; None where a word is a token."""
        return spelling(self.tokenizer, VOCABULARY, _ANSWERS, NAMES) if self.tokenizer else None

    @property
    def vocab(self) -> Sequence[str]:  # type: ignore[override]
        return self.spelling.vocab if self.spelling else VOCABULARY

    def told(self, batch: Batch) -> Batch:
        """Convert problems from word tokens to those of the pretrained model, if there is one."""
        return self.spelling(batch) if self.spelling else batch

    def tokens(self, n_words: int) -> int:
        """Maximum number of tokens of sentences of ``n_words`` words."""
        return math.ceil(self.spelling.tokens_a_word * n_words) if self.spelling else n_words

    def render(self, ids: Sequence[int]) -> str:
        return self.spelling.render(ids) if self.spelling else super().render(ids)


def encode(text: str) -> list[int]:
    """Word tokens of ``text``, in which words and punctuation marks are separated by spaces.

    Raises:
        ValueError: for a word outside of the vocabulary, with the nearest one in it.
    """
    try:
        return [ID[word] for word in text.split()]
    except KeyError as error:
        (word,) = error.args
        raise ValueError(f"{word!r} is not in the vocabulary of the word tasks; {nearest(word, VOCABULARY)}") from None


_FEW_NUMBERS = 3


class Patterns:
    """Patterns of one kind of sentence, such as ``"{0} has what {1} has ."``, with numbered slots for words.

    The subject of a sentence is the name in slot 0. For each name, a quarter of the patterns, at least one, is
    held out for the test, and training uses the others: no test sentence, and no pairing of its subject with its
    pattern, occurs in training. Names in other slots occur in all patterns.

    Args:
        patterns: at least two.
        names: possible subjects.
    """

    def __init__(self, *patterns: str, names: Sequence[str] = NAMES) -> None:
        assert len(patterns) > 1, "training and test need one each"
        self.patterns, self.names = patterns, names
        rows = [[-1 - int(w[1]) if w[0] == "{" else ID[w] for w in pattern.split()] for pattern in patterns]
        width = max(map(len, rows))
        self.codes = torch.tensor([row + [0] * (width - len(row)) for row in rows])

    @cached_property
    def held_out(self) -> Tensor:
        """(names, patterns) bool: which pairings are held out for the test."""
        n = max(1, len(self.patterns) // 4)
        rows = torch.zeros(len(self.names), len(self.patterns), dtype=torch.bool)
        for i, name in enumerate(self.names):
            by_chance = sorted(
                range(len(self.patterns)), key=lambda j: zlib.crc32(f"{name}/{self.patterns[j]}".encode())
            )
            rows[i, by_chance[:n]] = True
        return rows

    def sentences(self, name: Tensor, words: Sequence[Tensor], test: bool, generator: torch.Generator | None) -> Tensor:
        """Make a sentence about each name, in a random pattern of its split.

        Args:
            name: (n, S) index in ``names`` of each subject.
            words: the words for slots 0, 1, ..., (n, S) tokens each.
            test: whether for the test.

        Returns:
            (n, S, width) tokens, 0 beyond the end of a sentence.
        """
        may = self.held_out[name] if test else ~self.held_out[name]
        which = torch.multinomial(may.flatten(0, 1).float(), 1, generator=generator).view(name.shape)
        codes, slots = self.codes[which], torch.stack(list(words), 2)
        return torch.where(codes < 0, slots.gather(2, (-1 - codes).clamp(min=0)), codes)


def may_pair(test: bool) -> Tensor:
    """(names, names) bool, symmetric: which two names may occur in one sentence of the test, or of training."""
    return _FOR_TEST if test else ~_FOR_TEST & ~torch.eye(len(NAMES), dtype=torch.bool)


def _pairs_for_test() -> Tensor:
    pairs = torch.zeros(len(NAMES), len(NAMES), dtype=torch.bool)
    for i, one in enumerate(NAMES):
        for j, other in enumerate(NAMES[:i]):
            pairs[i, j] = pairs[j, i] = zlib.crc32(f"{one} and {other}".encode()) % 5 < 2
    return pairs


_FOR_TEST = _pairs_for_test()


def named(links: Tensor, test: bool, generator: torch.Generator | None) -> Tensor:
    """Draw distinct names (n, P); pairs that ``links`` (n, P, P) bool, i > j, sets may occur together in the split."""
    n, many, _ = links.shape
    forbidden = (~may_pair(test)).float()
    name = torch.full((n, many), -1)
    rows = torch.arange(n)
    while len(rows):  # a second round is rarely needed
        free = torch.ones(len(rows), len(NAMES), dtype=torch.bool)
        picked = torch.zeros(len(rows), many, dtype=torch.long)
        whole = torch.ones(len(rows), dtype=torch.bool)
        linked = links[rows].float()
        for i in range(many):
            may = free & ((linked[:, i, None, :i] @ forbidden[picked[:, :i]]).squeeze(1) == 0)
            whole &= may.any(1)
            may |= ~may.any(1, keepdim=True)
            picked[:, i] = torch.multinomial(may.float(), 1, generator=generator).squeeze(1)
            free.scatter_(1, picked[:, i : i + 1], False)
        name[rows] = picked
        rows = rows[~whole]
    return name


def numbers(size: float, modulus: int) -> int:
    """Range of the numbers in problems of a size, from 0 on: few when sums first occur, and all before chains do.

    With all numbers from the start a model may guess at sums for a thousand steps; sums of a few are learned quickly.
    """
    grown = min(1.0, (size - ALL_KINDS) / (CHAINS - ALL_KINDS) + 1e-6)
    return modulus if grown < 0 else _FEW_NUMBERS + int((modulus - _FEW_NUMBERS) * grown)


def padded(sentences: Sequence[Tensor]) -> list[Tensor]:
    """Pad parts of (n, S, width) tokens to the width of the widest."""
    width = max(part.shape[2] for part in sentences)
    return [F.pad(part, (0, width - part.shape[2])) for part in sentences]


def chosen(kind: Tensor, sentences: Sequence[Tensor]) -> Tensor:
    """Select for each place the sentence of its ``kind`` (n, S), from (n, S, width) tokens of each kind."""
    every = torch.stack(padded(sentences))
    return every.gather(0, kind[None, ..., None].expand_as(every[:1]))[0]


def joined(sentences: Sequence[Tensor]) -> tuple[Tensor, Tensor | None, Tensor]:
    """Concatenate sentences, in the given order.

    Args:
        sentences: (n, S, width) tokens each, 0 beyond the end of a sentence.

    Returns:
        ids (n, T), padded on the right; (n, T) bool, False at padding, or None without padding; and the position of
        the last token of every sentence, (n, sum of S).
    """
    flat = torch.cat([part.flatten(1) for part in sentences], 1)
    ends = torch.cat([(part != 0).sum(2) for part in sentences], 1).cumsum(1) - 1
    places = (flat == 0).long().argsort(stable=True, dim=1)
    ids = flat.gather(1, places)[:, : int(ends[:, -1].max()) + 1]
    valid = ids != 0
    return ids, None if bool(valid.all()) else valid, ends


def sentence_of(ids: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the sentence of each token of ``ids`` (n, T), and whether it is the last one in it.

    ``ends`` are those of :func:`joined`; padding belongs to the last sentence.
    """
    n, T = ids.shape
    sentence = torch.searchsorted(ends, torch.arange(T).repeat(n, 1)).clamp(max=ends.shape[1] - 1)
    return sentence, torch.zeros_like(ids, dtype=torch.bool).scatter_(1, ends, True)


def problems(ids: Tensor, valid: Tensor | None, places: Tensor, known: Tensor, questions: int) -> Batch:
    """Make a batch of ``ids`` and ``valid`` with step targets at some positions.

    Args:
        places: (n, E) positions; the last ones are those of the questions, which alone have final targets.
        known: (n, E, S) what is known at each after 0, 1, ... steps, tokens or ``UNSCORED``.
        questions: number of questions.
    """
    steps = torch.full((*ids.shape, known.shape[2]), UNSCORED)
    steps.scatter_(1, places[..., None].expand_as(known), known)
    targets = torch.full_like(ids, UNSCORED)
    targets.scatter_(1, places[:, -questions:], known[:, -questions:, -1])
    return Batch(ids, targets, valid, steps)


def from_loop(due: Tensor, value: Tensor, n_steps: int) -> Tensor:
    """Step targets (..., ``n_steps``): ``UNSCORED`` before step ``due`` (...), and ``value`` (...) from it on."""
    return torch.where(torch.arange(n_steps) < due[..., None], UNSCORED, value[..., None])
