"""Problems in words in the tokens of a pretrained model: the same problems, and the text that they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from open_mythos import tasks
from open_mythos.tasks import UNSCORED
from open_mythos.tasks.english import NAMES, THINGS, VOCABULARY
from open_mythos.tasks.tokenizer import Tokenizer, WordLevel

tokenizers = pytest.importorskip("tokenizers")

KINDS = ["assignments", "word_problems", "relations", "registers", "words"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A byte-level tokenizer that has read some of the words, so that names are one token or several."""
    made = tmp_path_factory.mktemp("tokenizer")
    read = [*VOCABULARY[2:], *THINGS * 9, *NAMES[:60] * 9]
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [f" {word} {word.capitalize()}." for word in read], 900, special_tokens=["<|end|>"], show_progress=False
    )
    bpe._tokenizer.save(str(made / "tokenizer.json"))
    (made / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    return str(made)


def drawn(task: tasks.Task, n: int = 6, difficulty: int = 2) -> tasks.Batch:
    return task.batch(n, difficulty, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("kind", KINDS)
def test_they_are_the_text_of_the_same_problems(kind: str, split: str, folder: str) -> None:
    words, spelled = tasks.load(kind, split=split), tasks.load(kind, split=split, tokenizer=folder)
    before, after, reads = drawn(words), drawn(spelled), spelled.spelling.tokenizer
    as_text = WordLevel(VOCABULARY)
    for row, ids in zip(before.ids.tolist(), after.ids.tolist(), strict=True):
        text = spelled.render(ids)
        assert reads.encode([text]).tolist() == [i for i in ids if i]
        assert text.lower() == as_text.decode(row).lower() and text[0].isupper()
    n_words = (before.ids != 0).sum(1)
    assert (after.ids != 0).sum(1).gt(n_words).all() and after.ids.shape[1] <= spelled.length(2)
    assert after.valid is None or torch.equal(after.valid, after.ids != 0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_asked_for_after_a_word_is_asked_for_after_its_last_token(kind: str, folder: str) -> None:
    words, spelled = tasks.load(kind, split="held_out"), tasks.load(kind, split="held_out", tokenizer=folder)
    before, after = drawn(words), drawn(spelled)
    for i in range(len(before.ids)):
        ends = [j for j, word in enumerate(before.ids[i].tolist()) if word and before.targets[i, j] != UNSCORED]
        places = (after.targets[i] != UNSCORED).nonzero().flatten().tolist()
        told = [j for j in ends if spelled.spelling.answers[before.targets[i, j]] != UNSCORED]
        assert len(places) == len(told)
        for j, place in zip(told, places, strict=True):
            said = "".join(spelled.vocab[k] for k in after.ids[i, : place + 1].tolist() if k)
            assert said.lower() == WordLevel(VOCABULARY).decode(before.ids[i, : j + 1].tolist()).lower()
            answer = VOCABULARY[before.targets[i, j]]
            assert spelled.vocab[after.targets[i, place]].strip() in answer
            expected = spelled.spelling.answers[before.steps[i, j].clamp(min=0)]
            expected[before.steps[i, j] == UNSCORED] = UNSCORED
            assert torch.equal(after.steps[i, place], expected)


def test_no_two_answers_are_one_token(folder: str) -> None:
    answers = tasks.load("assignments", tokenizer=folder).spelling.answers
    told = answers[answers != UNSCORED].tolist()
    assert len(told) == len(set(told)) > 60
    assert (answers[[VOCABULARY.index(thing) for thing in THINGS]] != UNSCORED).all()


def test_an_answer_ends_where_the_tokenizer_has_an_end(folder: str) -> None:
    spelled = tasks.load("words", tokenizer=folder)
    batch = drawn(spelled)
    assert (batch.targets == spelled.spelling.tokenizer.eos).any(1).any()


def test_numbers_that_no_token_tells_apart(folder: str) -> None:
    with pytest.raises(ValueError, match=r"no token of this model tells '1\d' from other numbers.*use modulus=7"):
        drawn(tasks.load("word_problems", modulus=23, tokenizer=folder), 64)


def test_a_tokenizer_that_has_read_no_english(tmp_path: Path) -> None:
    Tokenizer().save(tmp_path)
    with pytest.raises(ValueError, match="words that may be answers the tokenizer has a token of their own for"):
        drawn(tasks.load("assignments", tokenizer=str(tmp_path)))
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        drawn(tasks.load("assignments", tokenizer=str(tmp_path / "nowhere")))
