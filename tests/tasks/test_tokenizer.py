"""Tokenizers give back the text they were given."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from open_mythos.tasks import english
from open_mythos.tasks.english import VOCABULARY
from open_mythos.tasks.tokenizer import Tokenizer, WordLevel, load, tokenizer

CORPUS = ["for x in range(10):\n    print(x)\n" * 20, "\tnaïve «text» <pad>\n" * 5]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXTS)
def test_bytes_are_lossless_and_leave_zero_to_padding(text: str) -> None:
    made = Tokenizer()
    ids = made.encode([text])
    assert [made.pieces[i] for i in ids] == [bytes([b]) for b in text.encode()]
    assert 0 not in ids and made.decode([0, *ids, 0]) == text


@given(TEXTS)
def test_byte_pairs_are_lossless_and_leave_zero_to_padding(text: str) -> None:
    pytest.importorskip("tokenizers")
    made = tokenizer("bpe:300", CORPUS)
    ids = made.encode([text, text])
    assert b"".join(made.pieces[i] for i in ids) == text.encode() * 2
    assert 0 not in ids and made.decode(ids) == text + text


def test_byte_pairs_shorten_what_they_were_trained_on_and_repeat() -> None:
    pytest.importorskip("tokenizers")
    made, again = (tokenizer("bpe:280", CORPUS) for _ in range(2))
    assert len(made.pieces) == 280 and made.pieces == again.pieces
    assert len(set(made.pieces)) == 280 and {bytes([b]) for b in range(256)} < set(made.pieces)
    assert len(made.encode(CORPUS)) < len(Tokenizer().encode(CORPUS)) / 2


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of a byte-level tokenizer with a special token, and of one as SentencePiece's are."""
    tokenizers, root = pytest.importorskip("tokenizers"), tmp_path_factory.mktemp("pretrained")
    level = tokenizers.ByteLevelBPETokenizer()
    level.train_from_iterator(CORPUS, 300, special_tokens=["<|end|>"], show_progress=False)
    names = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", "a", "\u2581a"]
    piece = tokenizers.Tokenizer(tokenizers.models.BPE(
        {name: i for i, name in enumerate(names)}, [("\u2581", "a")], byte_fallback=True, unk_token="<unk>"
    ))  # fmt: skip
    piece.add_special_tokens(["<unk>"])
    piece.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    piece.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a"))
    for name, made in (("level", level), ("piece", piece), ("words", words)):
        (root / name).mkdir()
        made.save(str(root / name / "tokenizer.json"))
    return root


@pytest.mark.parametrize("kind", ["level", "piece"])
@given(TEXTS.filter(lambda text: "\u2581" not in text and "<" not in text))
def test_a_pretrained_tokenizer_keeps_its_numbers_and_is_lossless(pretrained: Path, kind: str, text: str) -> None:
    import tokenizers

    made = tokenizer(str(pretrained / kind), [])
    ids = made.encode([text, " a"])
    whole = tokenizers.Tokenizer.from_file(str(pretrained / kind / "tokenizer.json"))
    assert ids.tolist() == whole.encode(text).ids + whole.encode(" a").ids
    assert b"".join(made.pieces[i] for i in ids) == f"{text} a".encode() and made.decode(ids) == f"{text} a"
    assert len(made.pieces) == whole.get_vocab_size() and made.pieces[0] == b"", "special tokens stand for nothing"


def test_pretrained_tokenizers_that_will_not_do(pretrained: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer='nowhere'; use .* or a folder with a tokenizer\.json"):
        tokenizer("nowhere", [])
    with pytest.raises(ValueError, match="neither byte-level BPE nor SentencePiece"):
        tokenizer(str(pretrained / "words"), [])


def test_what_is_not_utf8_is_shown_as_such() -> None:
    assert Tokenizer().decode([0x61 + 1, 0xFF + 1]) == "a�"


@pytest.mark.parametrize("kind", ["bpe", "bpe:many", "bpe:256", "bpe:70000", "words"])
def test_other_names_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"tokenizer='{kind}'; use 'bytes', or 'bpe:N' with N from 257 to 65536"):
        tokenizer(kind, CORPUS)


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[tasks\]"'):
        tokenizer("bpe:300", CORPUS)


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("kind", ["bytes", "bpe:290"])
def test_what_is_saved_is_loaded_here_and_by_hugging_face(kind: str, ends: bool, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made, text = tokenizer(kind, CORPUS, ends), "for naïve <eos> in 🎈:\n"
    made.save(tmp_path)
    again = load(tmp_path)
    assert again.pieces == made.pieces and again.eos == made.eos == (0 if ends else None) and type(again) is type(made)
    assert np.array_equal(again.encode([text]), made.encode([text])) and again.decode(made.encode([text])) == text
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode("for naïve 🎈").ids == made.encode(["for naïve 🎈"]).tolist()
    assert theirs.decode(made.encode([text]).tolist()) == text and theirs.id_to_token(0) == (
        "<eos>" if ends else "<pad>"
    )


def test_any_byte_level_tokenizer_of_hugging_face_will_do(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = byte_level(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|start|>", "<|end|>"], initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )  # fmt: skip
    theirs.train_from_iterator(CORPUS, trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    assert load(tmp_path).eos is None
    theirs.add_tokens(["    ", "｜é｜"])  # text as it is, and no special tokens
    theirs.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
    made = tokenizer(str(tmp_path), [])
    assert made.eos == 1 and made.encode(["naïve range"]).tolist() == theirs.encode("naïve range").ids
    assert made.decode(made.encode(["a    b ｜é｜"])) == "a    b ｜é｜"
    assert made.decode(made.encode(["<|end|> is text"])) == "<|end|> is text" and made.pieces[1] == b""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|none|>"}))
    with pytest.raises(ValueError, match=r"tokenizer.json cannot be used: its vocabulary has no '<|none|>'"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer.json is missing, so text cannot be tokenised"):
        load(tmp_path / "nowhere")


def test_wide_vocabularies_need_wide_numbers() -> None:
    made = Tokenizer()
    assert made.encode(["a"]).dtype == made.encode([]).dtype == np.uint16
    made.pieces = made.pieces * 300
    assert made.dtype == np.uint32


def of_words(ends: bool = True) -> WordLevel:
    return WordLevel(VOCABULARY, ends)


def spelt(ids: Sequence[int]) -> str:
    return " ".join(VOCABULARY[i] for i in ids)


@pytest.mark.parametrize(("text", "words"), [
    ("Who has Ana's key?", "who has Ana 's key ?"),
    ("ana’s BOSS is ben, or 5.", "Ana 's boss is Ben , or 5 ."),
    ("Set A to 3. Will has a coin.\n What is in A?", "set A to 3 . Will has a coin . what is in A ?"),
])  # fmt: skip
def test_words_are_found_however_they_are_typed(text: str, words: str) -> None:
    assert spelt(of_words().encode([text])) == words


def test_words_become_sentences() -> None:
    words = of_words()
    ids = english.encode("who has Ana 's key ? Ben , if it is 5 . now who is Ana 's boss 's cook ?")
    said = "Who has Ana's key? Ben, if it is 5. Now who is Ana's boss's cook?"
    assert words.decode([*ids, 1, 0]) == said and words.encode([said]).tolist() == ids


@pytest.mark.parametrize(("word", "near"), [("bicycle", "uncle"), ("Anna", "Ana"), ("42", "4")])
def test_a_word_that_is_not_known_is_named_with_the_nearest(word: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"there is no word '{word}' here; the nearest is '{near}'"):
        of_words().encode([f"Ana has a {word}."])


@pytest.mark.parametrize("word", ["<end>", "@", "您好"])
def test_what_is_like_no_word_is_told_the_marks_there_are(word: str) -> None:
    with pytest.raises(ValueError, match=r"there is no word .* here; besides words there are \? \. , : 's"):
        of_words().encode([f"Ana has a {word}."])


@pytest.mark.parametrize("ends", [True, False])
def test_words_come_back_from_their_file_and_others_read_it(tmp_path: Path, ends: bool) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words, text = of_words(ends), "WHO has Ana’s key? Set A to 5: ben, Will has a coin."
    words.save(tmp_path)
    again = load(tmp_path)
    assert isinstance(again, WordLevel) and again.words == VOCABULARY
    assert (again.eos, again.asks) == (1 if ends else None, VOCABULARY.index("?"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>" if ends else "<pad>"}))
    assert load(tmp_path).eos == again.eos, "an exported model that never ends calls its padding so"
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = words.encode([text]).tolist()
    assert theirs.encode(text).ids == ids and theirs.decode(english.encode("Ana 's key .")) == "Ana's key."
    with pytest.raises(Exception, match="Missing"):
        theirs.encode("Ana rides.")
    (tmp_path / "tokenizer.json").write_text(words.to_json().replace('"key": ', '"key": 9'))
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be used: its token ids are not 0, 1, 2 and so on"):
        load(tmp_path)


def test_a_conversation_is_all_facts_and_the_last_question_in_transformers_too(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    said = [
        ("user", "Ana has what Ben has. Who is Ben's boss? Ben keeps a key."), ("assistant", ""),
        ("user", "what has Ben?"), ("assistant", "key"), ("user", "Ben likes Cora. What does Ana have?"),
    ]  # fmt: skip
    messages = [{"role": role, "content": content} for role, content in said]
    words = of_words()
    expected = "Ana has what Ben has . Ben keeps a key . Ben likes Cora . what does Ana have ?"
    assert words.template is not None and spelt(words.template(messages)) == expected
    words.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert spelt(ids) == expected and theirs.eos_token == "<end>"
    with pytest.raises(ValueError, match=r"end each sentence with \. or \?"):
        words.template([{"role": "user", "content": "What does Ana have"}])


def test_words_without_their_marks_are_refused() -> None:
    with pytest.raises(ValueError, match="should begin with <pad>, <end>"):
        WordLevel(["a", "b"])
    with pytest.raises(ValueError, match=r"no token for \. or \?"):
        WordLevel(["<pad>", "<end>", "a"])
