"""Text: windows of a corpus, and the number of bytes of each target."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from open_mythos import tasks
from open_mythos.tasks import UNSCORED
from open_mythos.tasks.corpus import documents, held_out
from open_mythos.tasks.text import Text

LINES = "".join(f"{i}: said the naïve écrivain\n" for i in range(12000))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "lines.txt"
    path.write_text(LINES)
    return str(path)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("kind", ["bytes", "bpe:300"])
def test_batches_are_windows_of_the_split_with_next_token_targets(source: str, kind: str) -> None:
    if kind != "bytes":
        pytest.importorskip("tokenizers")
    for split in ("train", "held_out"):
        task = Text(source=source, tokenizer=kind, split=split)
        wanted = "".join(
            document for document in documents(source, task.max_bytes) if held_out(document) == (split != "train")
        )
        assert task.decode(task.tokens) == wanted
        ids, targets, valid = task.batch(6, 20, seeded())
        assert ids.shape == targets.shape == (6, 20) and valid is None
        assert torch.equal(ids[:, 1:], targets[:, :-1])
        whole = task.tokens.tobytes()
        for row in torch.cat([ids, targets[:, -1:]], 1):
            assert row.numpy().astype(np.uint16).tobytes() in whole


def test_a_seed_reproduces_windows_and_they_differ_from_each_other(source: str) -> None:
    task = tasks.load("text", source=source)
    first, again = (task.batch(4, 16, seeded()) for _ in range(2))
    assert torch.equal(first.ids, again.ids) and len(first.ids.unique(dim=0)) == 4


def test_evaluation_windows_span_the_split_evenly(source: str) -> None:
    task = Text(source=source, split="held_out")
    ids, targets, _ = task.windows(32, 5)
    starts = [i * (len(task.tokens) - 33) // 4 for i in range(5)]
    for row, target, start in zip(ids, targets, starts, strict=True):
        assert row.tolist() == task.tokens[start : start + 32].tolist()
        assert target.tolist() == task.tokens[start + 1 : start + 33].tolist()
    assert starts[-1] + 33 == len(task.tokens)
    assert task.windows(32, 1).ids[0].tolist() == ids[0].tolist()


def test_bytes_of_counts_the_bytes_of_targets(source: str) -> None:
    pytest.importorskip("tokenizers")
    for kind in ("bytes", "bpe:300"):
        task = Text(source=source, tokenizer=kind)
        ids = task.encode("said the naïve\n")
        targets = torch.tensor([[*ids, UNSCORED]])
        counted = task.bytes_of(targets)
        assert counted.shape == targets.shape and counted[0, -1] == 0
        assert counted.sum() == len("said the naïve\n".encode())


def test_the_vocabulary_names_every_token(source: str) -> None:
    task = Text(source=source)
    assert task.vocab_size == 257 == len(set(task.vocab)) and task.chance == 1 / 257
    assert [task.vocab[i] for i in task.encode("a\n")] == ["a", "\\n"]
    assert task.render(task.encode("naïve\n")) == "naïve\n"


def test_windows_longer_than_the_split_are_refused(source: str) -> None:
    task = Text(source=source, split="held_out")
    longest = len(task.tokens) - 1
    assert task.most == longest and task.batch(2, longest, seeded()).ids.shape == (2, longest)
    assert torch.equal(task.windows(longest, 2).ids[0], task.windows(longest, 2).ids[1])
    for ask in (task.batch, task.windows):
        with pytest.raises(ValueError, match=f"the difficulty of text is its number of tokens, from 1 to {longest}"):
            ask(*((2, longest + 1) if ask == task.batch else (longest + 1, 2)))


def test_a_split_without_documents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "small.txt").write_text("a word")
    with pytest.raises(ValueError, match="too few documents for its held_out part"):
        Text(source=str(tmp_path), split="held_out")


def test_unknown_splits_and_options_are_refused() -> None:
    with pytest.raises(ValueError, match="split='test' is unknown; use one of 'train', 'held_out'"):
        tasks.load("text", split="test")
    with pytest.raises(ValueError, match=r"text has no option 'path' .*; it has source, tokenizer, split, max_bytes"):
        tasks.load("text", path="x")
