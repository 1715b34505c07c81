"""Tasks in words with the tokenizer of a pretrained model: the same problems, spelled as text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from open_mythos import tasks
from open_mythos.tasks import UNSCORED
from open_mythos.tasks.english import ID, NAMES, THINGS, VOCABULARY
from open_mythos.tasks.tokenizer import Tokenizer, WordLevel

tokenizers = pytest.importorskip("tokenizers")

KINDS = ["assignments", "word_problems", "relations", "registers", "words"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A byte-level tokenizer trained on some of the words, so that names are one token or several."""
    made = tmp_path_factory.mktemp("tokenizer")
    read = [*[word for word in VOCABULARY[2:] if word not in NAMES[60:]] * 3, *NAMES[60:]]
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [f" {word} {word.capitalize()}." for word in read], 1400, special_tokens=["<|end|>"], show_progress=False
    )
    bpe._tokenizer.save(str(made / "tokenizer.json"))
    (made / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    return str(made)


def drawn(task: tasks.Task, n: int = 6, difficulty: int = 2) -> tasks.Batch:
    return task.batch(n, difficulty, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("kind", KINDS)
def test_spelled_problems_are_the_text_of_the_problems_in_words(kind: str, split: str, folder: str) -> None:
    words, spelled = tasks.load(kind, split=split), tasks.load(kind, split=split, tokenizer=folder)
    before, after, reads = drawn(words), drawn(spelled), spelled.spelling.tokenizer
    as_text = WordLevel(VOCABULARY)
    for row, ids in zip(before.ids.tolist(), after.ids.tolist(), strict=True):
        row = row[: len(row) - row[::-1].index(ID["?"])]  # without the final answer, which spelled problems lack
        text = spelled.render(ids)
        assert reads.encode([text]).tolist() == [i for i in ids if i]
        assert text.lower() == as_text.decode(row).lower() and text[0].isupper()
    assert before.ids.shape[1] < after.ids.shape[1] <= spelled.length(2) <= 2 * words.length(2)
    assert after.valid is None or torch.equal(after.valid, after.ids != 0)


@pytest.mark.parametrize("kind", KINDS)
def test_targets_at_a_word_are_at_its_last_token(kind: str, folder: str) -> None:
    words, spelled = tasks.load(kind, split="held_out"), tasks.load(kind, split="held_out", tokenizer=folder)
    before, after = drawn(words), drawn(spelled)
    for i in range(len(before.ids)):
        ends = [j for j, word in enumerate(before.ids[i].tolist()) if word and before.targets[i, j] != UNSCORED]
        places = (after.targets[i] != UNSCORED).nonzero().flatten().tolist()
        answered = [j for j in ends if spelled.spelling.answers[before.targets[i, j]] != UNSCORED]
        assert len(places) == len(answered)
        for j, place in zip(answered, places, strict=True):
            text = "".join(spelled.vocab[k] for k in after.ids[i, : place + 1].tolist() if k)
            assert text.lower() == WordLevel(VOCABULARY).decode(before.ids[i, : j + 1].tolist()).lower()
            answer = VOCABULARY[before.targets[i, j]]
            assert spelled.vocab[after.targets[i, place]].strip() in answer
            expected = spelled.spelling.answers[before.steps[i, j].clamp(min=0)]
            expected[before.steps[i, j] == UNSCORED] = UNSCORED
            assert torch.equal(after.steps[i, place], expected)


def test_answers_are_distinct_tokens(folder: str) -> None:
    answers = tasks.load("assignments", tokenizer=folder).spelling.answers
    ids = answers[answers != UNSCORED].tolist()
    assert len(ids) == len(set(ids)) > 60
    assert (answers[[VOCABULARY.index(thing) for thing in THINGS]] != UNSCORED).all()


def test_moduli_above_10_are_refused(folder: str) -> None:
    for kind in ("word_problems", "registers"):
        with pytest.raises(ValueError, match=r"modulus=23, but .* may split numbers into digits; use at most 10"):
            tasks.load(kind, modulus=23, tokenizer=folder)
    with pytest.raises(ValueError, match="modulus=23, but tokenizer="):
        tasks.load("words", settings={"word_problems": {"modulus": 23}}, tokenizer=folder)


def test_each_task_of_words_is_spelled(folder: str) -> None:
    kinds = tasks.load("words", tokenizer=folder).by_kind([2])
    assert [part.tokenizer for part, _ in kinds] == [folder] * 4


def test_a_tokenizer_that_adds_spaces_is_refused(tmp_path: Path) -> None:
    """Like SentencePiece, which adds a space before every text that it encodes, and so before every word."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    space = tokenizers.normalizers
    bpe.normalizer = space.Sequence([space.Prepend("\u2581"), space.Replace(" ", "\u2581")])
    bpe.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>"], show_progress=False)
    bpe.train_from_iterator([f"{word} and {word}." for word in VOCABULARY[2:]], trainer)
    bpe.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"use a byte-level one, which adds no spaces"):
        drawn(tasks.load("assignments", tokenizer=str(tmp_path)))


def test_a_tokenizer_without_tokens_for_the_answers_is_refused(tmp_path: Path) -> None:
    Tokenizer().save(tmp_path)
    with pytest.raises(ValueError, match=r"the tokenizer has no token that only .* contain; use one trained"):
        drawn(tasks.load("assignments", tokenizer=str(tmp_path)))
    with pytest.raises(ValueError, match=r"nowhere' has no tokenizer\.json; give the folder"):
        drawn(tasks.load("assignments", tokenizer=str(tmp_path / "nowhere")))
