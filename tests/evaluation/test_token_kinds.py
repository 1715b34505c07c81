"""The kinds of the bytes of a text, compared with labels by hand, and their bits per byte."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_config

from open_mythos import OpenMythos
from open_mythos.evaluation.text import bits_per_byte
from open_mythos.evaluation.token_kinds import KINDS, bits_by_kind, bytes_by_kind, kinds_of
from open_mythos.tasks.text import Text

LETTERS = dict(zip(KINDS, "cn9.s", strict=True))


def marked(text: str, is_python: bool = True) -> str:
    return "".join(LETTERS[KINDS[kind]] for kind in kinds_of(text.encode(), is_python))


@pytest.mark.parametrize("text, kinds", [
    ("def add(a, b): return a + b", "....nnn.n..n..........c...c"),
    ("x1 = 0x1f + 2.5e3; xx = x1", "nn...9999...99999..nn...cc"),
    ("n = 1  # n is one\nn", "n...9..ssssssssss.c"),
    ("f('it\\'s', \"a'b\") # f", "n.sssssss..sssss..sss"),
    ('r = rb"x" + ur', "n...sssss...nn"),
    ('a\n"""b\n# c""" a', "n.sssssssssss.c"),
    ("'open\na", "sssss.n"),
])  # fmt: skip
def test_python_source_is_classified_by_byte(text: str, kinds: str) -> None:
    assert marked(text) == kinds, f"\n{text!r}\n{marked(text)}"


def test_plain_text_has_words_numbers_and_other_bytes() -> None:
    text = "If Ana's 3.5 if Ana é é"
    assert marked(text, is_python=False) == "nn.nnn.n.999.nn.ccc.nn.cc"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        lines = f'"""Says {i} to all,\n\nand value is not a name here."""\nvalue = {i}\nprint(value, other_{i})\n'
        (folder / f"m{i}.py").write_text(lines)
    return str(folder / "*.py")


def test_a_window_that_starts_inside_a_string_is_classified_as_string(corpus: str) -> None:
    task = Text(source=corpus, split="held_out")
    batch = task.windows(24, 30)
    counts = bytes_by_kind(task, batch)
    assert torch.equal(counts.sum(-1), torch.ones(30, 24)), "each byte is of one kind"
    found = [task.decode(row[counts[i, :, 4] == 1].tolist()) for i, row in enumerate(batch.targets)]
    assert any("value is not a" in text for text in found)
    assert not any("value =" in text or "print" in text for text in found)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
@pytest.mark.parametrize("separate", [False, True])
def test_bits_of_all_kinds_sum_to_bits_per_byte(corpus: str, tokenizer: str, separate: bool) -> None:
    task = Text(source=corpus, tokenizer=tokenizer, split="held_out", separate=separate)
    torch.manual_seed(0)
    model = OpenMythos(tiny_config(vocab_size=task.vocab_size, halting=False, max_seq_len=64))
    kinds = bits_by_kind(model, task, 2, 48, 12)
    assert sum(share for _, share in kinds.values()) == pytest.approx(1)
    whole = bits_per_byte(model, task, [2], 48, 12)[2]
    assert sum(bits * share for bits, share in kinds.values()) == pytest.approx(whole, rel=1e-5)
    assert {"copied name", "new name", "comment or string"} <= kinds.keys()


def test_tokens_of_several_kinds_are_split_by_byte(corpus: str) -> None:
    task = Text(source=corpus, tokenizer="bpe:300", split="held_out")
    counts = bytes_by_kind(task, batch := task.windows(24, 12))
    torch.testing.assert_close(counts.sum(-1).long(), task.bytes_of(batch.targets))
    assert ((counts > 0).sum(-1) > 1).any(), "such as a space and a name"
