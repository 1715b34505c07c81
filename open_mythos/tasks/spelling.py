"""Problems in words, spelled in the tokens of a pretrained model."""

from collections import Counter
from collections.abc import Collection, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.fields import must
from open_mythos.tasks.base import UNSCORED, Batch
from open_mythos.tasks.tokenizer import Tokenizer, load

_GLUED = (".", ",", ":", "?", "'s")  # written without a space before them
_SAID = 2  # words from this one on are words; those before are padding, and the end of an answer


class Spelling:
    """How the tokens of a pretrained model spell words: " key" inside a sentence, " Set" where one begins.

    What is asked for at a word is asked for at its last token. As an answer a word is one token, the first of its own
    that is in no other: " key", but "ita" of " Zita", which begins as " Zeno" does. Names that no token tells from
    others, such as " G" and "ina" beside " Gail" and " Tina", are not asked for.

    Args:
        tokenizer: of the model.
        words: by token of the task; the first two are padding, and the end of an answer.
        answers: those that may be answers; numbers of one digit, for digits may be tokens.

    Attributes:
        tokenizer: as above.
        vocab: text of each of its tokens.

    Raises:
        ValueError: for a tokenizer that writes a word with token 0, which is padding, or tells few answers apart.
    """

    def __init__(self, tokenizer: Tokenizer, words: Sequence[str], answers: Collection[str]) -> None:
        self.tokenizer, self.words = tokenizer, words
        self.vocab = tuple(piece.decode(errors="replace") for piece in tokenizer.pieces)
        capital = [word[0].upper() + word[1:] for word in words]
        spaced = [[("" if word in _GLUED else " ") + word for word in forms] for forms in (words, capital)]
        forms = [[self._ids(form) for form in kind[_SAID:]] for kind in (*spaced, capital)]
        width = max(len(ids) for kind in forms for ids in kind)
        # of each word inside a sentence, at the beginning of one, and of the text; 0 where it is shorter
        self.pieces = torch.zeros(3, len(words), width, dtype=torch.long)
        for kind, found in enumerate(forms):
            self.pieces[kind, _SAID:] = torch.tensor([ids + [0] * (width - len(ids)) for ids in found])
        self.ends_sentence = torch.tensor([word in (".", "?") for word in words])
        known = {word: set(ids) for word, ids in zip(words[_SAID:], forms[0], strict=True) if word in answers}
        shared = Counter(i for ids in known.values() for i in ids)
        own = [[i for i in ids if shared[i] == 1] for ids in forms[0]]
        self.answers = torch.full((len(words),), UNSCORED)
        for word, (name, ids) in enumerate(zip(words[_SAID:], own, strict=True), _SAID):
            if name in known and ids:
                self.answers[word] = ids[0]
        n_told = int((self.answers != UNSCORED).sum())
        must(
            2 * n_told > len(known),
            f"of {len(known)} words that may be answers the tokenizer has a token of their own for {n_told} only; "
            f"use one of a model that has read English",
        )
        if tokenizer.eos is not None:
            self.answers[_SAID - 1] = tokenizer.eos

    def _ids(self, text: str) -> list[int]:
        ids = [int(i) for i in self.tokenizer.encode([text])]
        must(0 not in ids, f"the tokenizer writes {text!r} with token 0, which is padding here; use another tokenizer")
        return ids

    def __call__(self, batch: Batch) -> Batch:
        """The same problems in the model's tokens.

        Raises:
            ValueError: where an answer is a number that no token tells from others.
        """
        for word in batch.targets[batch.targets != UNSCORED].unique().tolist():
            must(
                int(self.answers[word]) != UNSCORED or not self.words[word].isdecimal(),
                f"no token of this model tells {self.words[word]!r} from other numbers, whose digits are tokens; use "
                f"modulus=7",
            )
        ids, said = batch.ids, batch.ids != 0
        is_last = said & ~F.pad(said[:, 1:], (0, 1))  # an answer behind its question is no sentence
        kind = F.pad(self.ends_sentence[ids[:, :-1]], (1, 0)).long().masked_fill(is_last, 0)
        kind[:, 0] = 2
        pieces = self.pieces[kind, ids]
        ends = (pieces != 0).sum(2).cumsum(1) - 1
        flat = pieces.flatten(1)
        order = (flat == 0).long().argsort(stable=True, dim=1)
        spelled = flat.gather(1, order)[:, : int(ends[:, -1].max()) + 1]
        rows, at = said.nonzero(as_tuple=True)[0], ends[said]

        def moved(asked: Tensor) -> Tensor:
            found = asked.new_full((*spelled.shape, *asked.shape[2:]), UNSCORED)
            of_words = asked[said]
            found[rows, at] = torch.where(of_words == UNSCORED, UNSCORED, self.answers[of_words.clamp(min=0)])
            return found

        valid = spelled != 0
        steps = None if batch.steps is None else moved(batch.steps)
        return Batch(spelled, moved(batch.targets), None if bool(valid.all()) else valid, steps)


@lru_cache(maxsize=4)
def spelling(directory: str, words: tuple[str, ...], answers: tuple[str, ...]) -> Spelling:
    """Of the tokenizer in ``directory``; errors as :func:`~open_mythos.tasks.tokenizer.load` and :class:`Spelling`."""
    return Spelling(load(directory), words, answers)
