"""Tokenizers give back the text they were given."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from open_mythos.tasks.tokenizer import Tokenizer, tokenizer

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


def test_what_is_not_utf8_is_shown_as_such() -> None:
    assert Tokenizer().decode([0x61 + 1, 0xFF + 1]) == "a�"


@pytest.mark.parametrize("kind", ["bpe", "bpe:many", "bpe:256", "bpe:70000", "words"])
def test_other_names_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"tokenizer='{kind}'; use 'bytes', or 'bpe:N' with N from 257 to 65536"):
        tokenizer(kind, CORPUS)


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'open-mythos\[tasks\]'"):
        tokenizer("bpe:300", CORPUS)
