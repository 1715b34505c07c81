"""Problems in words, spelled in the tokens of a pretrained model."""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.fields import must
from open_mythos.tasks.base import UNSCORED, Batch
from open_mythos.tasks.tokenizer import FILE, Tokenizer, load

_GLUED = (".", ",", ":", "?", "'s")  # written without a space before them
_SAID = 2  # first index of a real word; before it are padding and the end of an answer


class Spelling:
    """The spelling of words in tokens of a pretrained model: " key" inside a sentence, " Set" at the start of one.

    The targets of a word are at its last token. As an answer a word is a single token, the first one that no other
    answer contains: " key", but "ita" of " Zita", which begins as " Zeno" does. Names without such a token, such as
    " G", "ina" beside " Gail" and " Tina", are left unscored.

    Args:
        tokenizer: of the model.
        words: by token of the task; the first two are padding, and the end of an answer.
        answers: words that are answers, each of which needs a token of its own.
        names: names, which are scored as answers only where they have a token of their own.

    Attributes:
        tokenizer: as above.
        vocab: text of each of its tokens.
        answers: (words,) the token of each word as an answer, or ``UNSCORED``.
        tokens_a_word: maximum mean tokens per word, in sentences where at most every second word is answer or name.

    Raises:
        ValueError: for a tokenizer that writes a word with token 0, which is padding; does not spell a word the same
            way in every sentence; or has no token that only one answer contains.
    """

    def __init__(
        self, tokenizer: Tokenizer, words: Sequence[str], answers: Sequence[str], names: Sequence[str]
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab = tuple(piece.decode(errors="replace") for piece in tokenizer.pieces)
        capital = [word[0].upper() + word[1:] for word in words]
        spaced = [[("" if word in _GLUED else " ") + word for word in forms] for forms in (words, capital)]
        forms = [[self._ids(form) for form in kind[_SAID:]] for kind in (*spaced, capital)]
        width = max(len(ids) for kind in forms for ids in kind)
        # tokens of each word inside a sentence, at the start of one, and at the start of the text; padded with 0
        self.pieces = torch.zeros(3, len(words), width, dtype=torch.long)
        for kind, found in enumerate(forms):
            self.pieces[kind, _SAID:] = torch.tensor([ids + [0] * (width - len(ids)) for ids in found])
        self.ends_sentence = torch.tensor([word in (".", "?") for word in words])
        self._check_sentence(words)
        inside = dict(zip(words[_SAID:], forms[0], strict=True))
        among_answers = Counter(i for word in answers for i in set(inside[word]))
        among_all = among_answers + Counter(i for word in names for i in set(inside[word]))
        own = {word: [i for i in inside[word] if among_answers[i] == 1] for word in answers}
        own |= {word: [i for i in inside[word] if among_all[i] == 1] for word in names}
        untold = [word for word in answers if not own[word]]
        said = f"the tokenizer has no token that only {', '.join(untold[:3])} contain; use one trained on English"
        must(not untold, said)
        self.answers = torch.tensor([own[word][0] if own.get(word) else UNSCORED for word in words])
        widest = max(len(inside[word]) for word in own)
        others = [ids for word, ids in inside.items() if word not in own and not word.isdecimal()]
        self.tokens_a_word = (widest + max(map(len, others))) / 2

    def _ids(self, text: str) -> list[int]:
        ids = [int(i) for i in self.tokenizer.encode([text])]
        must(0 not in ids, f"the tokenizer encodes {text!r} with token 0, which is padding here; use another tokenizer")
        return ids

    def _check_sentence(self, words: Sequence[str]) -> None:
        sentence = "Ana has 3 coins . who is Ben 's boss ?"
        ids = torch.tensor([[words.index(word) for word in sentence.split(" ")]])
        spelled = self._spelled(ids)[0][0].tolist()
        text = self.render(spelled)
        is_same = text == "Ana has 3 coins. Who is Ben's boss?" and self._ids(text) == spelled
        must(is_same, f"the tokenizer decodes separate words to {text!r}; use a byte-level one, which adds no spaces")

    def render(self, ids: Sequence[int]) -> str:
        """The text of tokens, without padding."""
        return self.tokenizer.decode([i for i in ids if i])

    def _spelled(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (n, T') of words (n, T), padded on the right, and the position of the last one of each, (n, T)."""
        kind = F.pad(self.ends_sentence[ids[:, :-1]], (1, 0)).long()
        kind[:, 0] = 2
        pieces = self.pieces[kind, ids]
        ends = (pieces != 0).sum(2).cumsum(1) - 1
        flat = pieces.flatten(1)
        order = (flat == 0).long().argsort(stable=True, dim=1)
        return flat.gather(1, order)[:, : int(ends[:, -1].max()) + 1], ends

    def __call__(self, batch: Batch) -> Batch:
        """The same problems in the model's tokens."""
        said = batch.ids != 0
        spelled, ends = self._spelled(batch.ids)
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
def spelling(directory: str, words: tuple[str, ...], answers: tuple[str, ...], names: tuple[str, ...]) -> Spelling:
    """Spelling by the tokenizer in ``directory``; errors of :func:`~open_mythos.tasks.tokenizer.load` and the class."""
    is_there = Path(directory, FILE).is_file()
    must(is_there, f"tokenizer={directory!r} has no {FILE}; give the folder of a pretrained model's tokenizer")
    try:
        return Spelling(load(directory), words, answers, names)
    except ValueError as error:
        raise ValueError(f"tokenizer={directory!r}: {error}") from error
