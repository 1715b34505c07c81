"""Tokenizers decode to the text that they encoded."""

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
def test_bytes_are_lossless_and_reserve_0_for_padding(text: str) -> None:
    made = Tokenizer()
    ids = made.encode([text])
    assert [made.pieces[i] for i in ids] == [bytes([b]) for b in text.encode()]
    assert 0 not in ids and made.decode([0, *ids, 0]) == text


@given(TEXTS)
def test_byte_pairs_are_lossless_and_reserve_0_for_padding(text: str) -> None:
    pytest.importorskip("tokenizers")
    made = tokenizer("bpe:300", CORPUS)
    ids = made.encode([text, text])
    assert b"".join(made.pieces[i] for i in ids) == text.encode() * 2
    assert 0 not in ids and made.decode(ids) == text + text


def test_byte_pairs_compress_their_training_text_and_are_reproducible() -> None:
    pytest.importorskip("tokenizers")
    made, again = (tokenizer("bpe:280", CORPUS) for _ in range(2))
    assert len(made.pieces) == 280 and made.pieces == again.pieces
    assert len(set(made.pieces)) == 280 and {bytes([b]) for b in range(256)} < set(made.pieces)
    assert len(made.encode(CORPUS)) < len(Tokenizer().encode(CORPUS)) / 2


def test_truncation_and_padding_saved_with_a_tokenizer_are_ignored(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    level = tokenizers.ByteLevelBPETokenizer()
    level.train_from_iterator(CORPUS, 300, special_tokens=["<|end|>"], show_progress=False)
    level.save(str(tmp_path / "tokenizer.json"))
    plain = load(tmp_path).encode([*CORPUS, "a"])
    level.enable_truncation(4)
    level.enable_padding(length=16)
    level.save(str(tmp_path / "tokenizer.json"))
    assert load(tmp_path).encode([*CORPUS, "a"]).tolist() == plain.tolist()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of a byte-level tokenizer with a special token, one like SentencePiece's, and a word-level one."""
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
def test_a_pretrained_tokenizer_keeps_its_ids_and_is_lossless(pretrained: Path, kind: str, text: str) -> None:
    import tokenizers

    made = tokenizer(str(pretrained / kind), [])
    ids = made.encode([text, " a"])
    whole = tokenizers.Tokenizer.from_file(str(pretrained / kind / "tokenizer.json"))
    assert ids.tolist() == whole.encode(text).ids + whole.encode(" a").ids
    assert b"".join(made.pieces[i] for i in ids) == f"{text} a".encode() and made.decode(ids) == f"{text} a"
    assert len(made.pieces) == whole.get_vocab_size() and made.pieces[0] == b"", "special tokens stand for no bytes"


def test_missing_and_unsupported_pretrained_tokenizers_are_refused(pretrained: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer='nowhere'; use .* or a folder with a tokenizer\.json"):
        tokenizer("nowhere", [])
    with pytest.raises(ValueError, match="neither byte-level BPE nor SentencePiece"):
        tokenizer(str(pretrained / "words"), [])


def test_invalid_utf8_decodes_to_the_replacement_character() -> None:
    assert Tokenizer().decode([0x61 + 1, 0xFF + 1]) == "a�"


@pytest.mark.parametrize("kind", ["bpe", "bpe:many", "bpe:256", "bpe:70000", "words"])
def test_unknown_tokenizer_names_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"tokenizer='{kind}'; use 'bytes', or 'bpe:N' with N from 257 to 65536"):
        tokenizer(kind, CORPUS)


def test_a_missing_tokenizers_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[tasks\]"'):
        tokenizer("bpe:300", CORPUS)


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("kind", ["bytes", "bpe:290"])
def test_saved_tokenizers_are_loaded_here_and_by_hugging_face(kind: str, ends: bool, tmp_path: Path) -> None:
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


def test_any_byte_level_tokenizer_of_hugging_face_is_loaded(tmp_path: Path) -> None:
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
    theirs.add_tokens(["    ", "｜é｜"])  # added tokens that are plain text, not special
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


def test_ids_of_large_vocabularies_are_uint32() -> None:
    made = Tokenizer()
    assert made.encode(["a"]).dtype == made.encode([]).dtype == np.uint16
    made.pieces = made.pieces * 300
    assert made.dtype == np.uint32


def word_tokenizer(ends: bool = True) -> WordLevel:
    return WordLevel(VOCABULARY, ends)


def spelt(ids: Sequence[int]) -> str:
    return " ".join(VOCABULARY[i] for i in ids)


@pytest.mark.parametrize(("text", "words"), [
    ("Who has Ana's key?", "who has Ana 's key ?"),
    ("ana’s BOSS is ben, or 5.", "Ana 's boss is Ben , or 5 ."),
    ("Set A to 3. Will has a coin.\n What is in A?", "set A to 3 . Will has a coin . what is in A ?"),
])  # fmt: skip
def test_words_are_encoded_regardless_of_case_and_apostrophes(text: str, words: str) -> None:
    assert spelt(word_tokenizer().encode([text])) == words


def test_words_are_decoded_to_sentences() -> None:
    words = word_tokenizer()
    ids = english.encode("who has Ana 's key ? Ben , if it is 5 . now who is Ana 's boss 's cook ?")
    text = "Who has Ana's key? Ben, if it is 5. Now who is Ana's boss's cook?"
    assert words.decode([*ids, 1, 0]) == text and words.encode([text]).tolist() == ids


@pytest.mark.parametrize(("word", "near"), [("bicycle", "uncle"), ("Anna", "Ana"), ("42", "4")])
def test_an_unknown_word_is_refused_with_the_nearest_known_one(word: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"there is no word '{word}' here; the nearest is '{near}'"):
        word_tokenizer().encode([f"Ana has a {word}."])


@pytest.mark.parametrize("word", ["<end>", "@", "您好"])
def test_unknown_characters_are_refused_with_the_known_marks(word: str) -> None:
    with pytest.raises(ValueError, match=r"there is no word .* here; besides words there are \? \. , : 's"):
        word_tokenizer().encode([f"Ana has a {word}."])


@pytest.mark.parametrize("ends", [True, False])
def test_a_saved_word_tokenizer_is_loaded_here_and_by_hugging_face(tmp_path: Path, ends: bool) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words, text = word_tokenizer(ends), "WHO has Ana’s key? Set A to 5: ben, Will has a coin."
    words.save(tmp_path)
    again = load(tmp_path)
    assert isinstance(again, WordLevel) and again.words == VOCABULARY
    assert (again.eos, again.asks) == (1 if ends else None, VOCABULARY.index("?"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>" if ends else "<pad>"}))
    assert load(tmp_path).eos == again.eos, "an exported model without an end token has <pad> as its eos_token"
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = words.encode([text]).tolist()
    assert theirs.encode(text).ids == ids and theirs.decode(english.encode("Ana 's key .")) == "Ana's key."
    with pytest.raises(Exception, match="Missing"):
        theirs.encode("Ana rides.")
    (tmp_path / "tokenizer.json").write_text(words.to_json().replace('"key": ', '"key": 9'))
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be used: its token ids are not 0, 1, 2 and so on"):
        load(tmp_path)


def test_the_chat_template_keeps_all_facts_and_the_last_question(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    turns = [
        ("user", "Ana has what Ben has. Who is Ben's boss? Ben keeps a key."), ("assistant", ""),
        ("user", "what has Ben?"), ("assistant", "key"), ("user", "Ben likes Cora. What does Ana have?"),
    ]  # fmt: skip
    messages = [{"role": role, "content": content} for role, content in turns]
    words = word_tokenizer()
    expected = "Ana has what Ben has . Ben keeps a key . Ben likes Cora . what does Ana have ?"
    assert words.template is not None and spelt(words.template(messages)) == expected
    words.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert spelt(ids) == expected and theirs.eos_token == "<end>"
    with pytest.raises(ValueError, match=r"end each sentence with \. or \?"):
        words.template([{"role": "user", "content": "What does Ana have"}])


def test_a_vocabulary_without_end_token_or_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="should begin with <pad>, <end>"):
        WordLevel(["a", "b"])
    with pytest.raises(ValueError, match=r"no token for \. or \?"):
        WordLevel(["<pad>", "<end>", "a"])
