"""Text of separate documents: tokens on disk, rows of tokens, and which process gets which row."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from open_mythos.tasks import UNSCORED, Batch, corpus, pad
from open_mythos.tasks import text as text_module
from open_mythos.tasks.corpus import held_out
from open_mythos.tasks.filling import tokenised
from open_mythos.tasks.text import Rows, Text
from open_mythos.tasks.tokenizer import Tokenizer

DOCUMENTS = [f"{i}: naïve " + "words " * (i % 7) + "<eos>" for i in range(60)]


def write(folder: Path, documents: list[str]) -> str:
    folder.mkdir(exist_ok=True)
    for i, document in enumerate(documents):
        (folder / f"{i:03d}.txt").write_text(document)
    return str(folder)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return Text(source=write(tmp_path_factory.mktemp("corpus"), DOCUMENTS), separate=True)


def expected_rows(task: Text, length: int) -> Counter[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Rows made in the obvious way: end tokens before, between and after documents; split; the last row padded."""
    stream = [0]
    for document in DOCUMENTS:
        if held_out(document) == (task.split == "held_out"):
            stream += [*(1 + b for b in document.encode()), 0]
    rows: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    for start in range(0, len(stream) - 1, length):
        ids, targets = stream[start : start + length], stream[start + 1 : start + 1 + length]
        ids = ids[: len(targets)]
        rest = length - len(targets)
        rows[(*ids, *[0] * rest), (*targets, *[UNSCORED] * rest)] += 1
    return rows


def found_rows(batches: list[Batch]) -> Counter[tuple[tuple[int, ...], tuple[int, ...]]]:
    rows = (pair for batch in batches for pair in zip(batch.ids.tolist(), batch.targets.tolist(), strict=True))
    return Counter((tuple(ids), tuple(targets)) for ids, targets in rows)


# -- rows


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("length", [1, 7, 16, 5000])
def test_every_token_is_a_target_once_per_epoch(task: Text, split: str, length: int) -> None:
    task = Text(source=task.source, separate=True, split=split)
    n = task.n_rows(length)
    epochs = [task.rows(range(epoch * n, (epoch + 1) * n), length, seed=3) for epoch in range(2)]
    for epoch in epochs:
        assert found_rows([epoch]) == expected_rows(task, length)
    assert n < 9 or not torch.equal(epochs[0].ids, epochs[1].ids), "another order in the second epoch"


def test_documents_are_numbered_and_padding_is_zero(task: Text) -> None:
    ids, targets, valid = task.rows(range(task.n_rows(16)), 16)
    assert valid is not None and torch.equal(valid == 0, targets == UNSCORED) and (valid == 0).any()
    for row, numbers in zip(ids, valid, strict=True):
        real = numbers > 0
        steps = numbers[real].diff()
        assert ((steps == 0) | (steps == 1)).all()
        assert torch.equal(steps == 1, row[real][1:] == 0), "an end token belongs to the document after it"
    assert task.vocab[0] == "<eos>" and task.eos == 0 and task.vocab_size == 257


@given(
    length=st.integers(12, 70), batch_size=st.integers(1, 9), world_size=st.integers(1, 8), n_workers=st.integers(1, 5),
    seed=st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=12)
def test_ranks_and_workers_together_read_every_row_equally_often(
    task: Text, length: int, batch_size: int, world_size: int, n_workers: int, seed: int
) -> None:
    n = task.n_rows(length)
    with pytest.MonkeyPatch.context() as patch:
        shares = []
        for rank in range(world_size):
            for worker in range(n_workers):
                info = type("Info", (), {"id": worker, "num_workers": n_workers})
                patch.setattr(text_module, "get_worker_info", lambda info=info: info)
                shares += list(Rows(task, length, batch_size, seed, rank, world_size, last=n))
    assert found_rows(shares) == Counter({row: batch_size * m for row, m in expected_rows(task, length).items()})


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_data_loader_gives_the_same_batches_for_any_number_of_workers(task: Text, world_size: int) -> None:
    for rank in range(world_size):
        rows = Rows(task, 16, 6, rank=rank, world_size=world_size, first=2, last=9)
        plain = list(rows)
        whole = [task.rows(range(6 * i, 6 * i + 6), 16) for i in range(2, 9)]
        for mine, all_of_it in zip(plain, whole, strict=True):
            assert torch.equal(mine.ids, all_of_it.ids[rank::world_size])
        for n_workers in (1, 3):
            loaded = list(DataLoader(rows, batch_size=None, num_workers=n_workers))
            assert len(loaded) == len(plain)
            for one, other in zip(loaded, plain, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    with pytest.raises(ValueError, match="rank=3 of world_size=3; use 0 to 2"):
        Rows(task, 16, 6, rank=3, world_size=3)


def test_evaluation_windows_do_not_score_end_tokens(task: Text) -> None:
    held = Text(source=task.source, separate=True, split="held_out")
    ids, targets, valid = held.windows(40, 5)
    assert valid is not None and (ids == 0).any() and not (targets == 0).any()
    assert int(held.bytes_of(targets[targets != UNSCORED]).sum()) == int((targets != UNSCORED).sum())


def test_padding_keeps_document_numbers(task: Text) -> None:
    rows = task.rows(range(2), 16)
    padded = pad([rows, Batch(torch.ones(1, 20, dtype=torch.int64), torch.ones(1, 20, dtype=torch.int64))])
    assert padded.valid is not None and rows.valid is not None
    assert torch.equal(padded.valid[:2, :16], rows.valid) and padded.valid[2].tolist() == [1] * 20
    assert task.mixed([4, 8], torch.Generator().manual_seed(0)).ids.shape == (2, 8)


# -- tokens on disk


def test_tokens_are_cached_until_the_text_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "corpus", DOCUMENTS)
    first = tokenised(source, "bytes", 0)
    train, held = (sum(held_out(document) == side for document in DOCUMENTS) for side in (False, True))
    assert (first.parts["train"].documents, first.parts["held_out"].documents) == (train, held)
    assert sum(part.bytes for part in first.parts.values()) == sum(len(text.encode()) for text in DOCUMENTS)
    monkeypatch.setattr(corpus, "stream", pytest.fail)
    assert tokenised(source, "bytes", 0).parts == first.parts, "read from disk"
    monkeypatch.undo()
    (tmp_path / "corpus/000.txt").write_text("something else, and longer than what was there before")
    assert tokenised(source, "bytes", 0).parts["train"].crc32 != first.parts["train"].crc32
    assert not list(Path(os.environ["OPEN_MYTHOS_CACHE"], "text").glob("making-*"))


def test_a_saved_byte_pair_tokenizer_gives_the_same_tokens(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    task = Text(source=write(tmp_path / "corpus", DOCUMENTS), tokenizer="bpe:300", separate=True)
    (tmp_path / "kept").mkdir()
    task.save_tokenizer(tmp_path / "kept")
    again = Text(source=task.source, tokenizer=str(tmp_path / "kept"), separate=True)
    assert again.vocab == task.vocab and again.fingerprint() == task.fingerprint()
    ends = task.tokens[:] == 0
    assert int(ends.sum()) == 1 + task.store.parts["train"].documents  # type: ignore[union-attr]
    wanted = "".join(document for document in DOCUMENTS if not held_out(document))
    assert task.decode(task.tokens) == wanted, "'<eos>' in a text is text"


def test_of_few_documents_one_is_still_held_out(tmp_path: Path) -> None:
    texts = [f"{i}" for i in range(50) if not held_out(f"{i}")][:2]
    source = write(tmp_path / "two", texts)
    task = Text(source=source, separate=True)
    assert task.decode(task.tokens) == texts[0]
    assert Text(source=source, separate=True, split="held_out").windows(64, 2).ids.shape == (2, 64)
    with pytest.raises(ValueError, match="too few documents for its train part; use more text"):
        Text(source=write(tmp_path / "one", texts[:1]), separate=True)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path: Path) -> None:
    Tokenizer(ends=False).save(tmp_path)
    with pytest.raises(ValueError, match="has no end-of-document token"):
        Text(source=write(tmp_path / "corpus", DOCUMENTS), tokenizer=str(tmp_path), separate=True)


def test_a_hugging_face_dataset_is_streamed_from_a_local_folder(tmp_path: Path) -> None:
    """With the real ``datasets`` package, from local JSON lines instead of a hub name."""
    pytest.importorskip("datasets")
    (tmp_path / "rows").mkdir()
    lines = [json.dumps({"text": document, "id": i}) for i, document in enumerate(DOCUMENTS)]
    (tmp_path / "rows/a.jsonl").write_text("\n".join(lines[:30]))
    (tmp_path / "rows/b.jsonl").write_text("\n".join(lines[30:]))
    task = Text(source=f"hf:{tmp_path / 'rows'}", separate=True)
    assert task.decode(task.tokens) == "".join(document for document in DOCUMENTS if not held_out(document))
    few = Text(source=f"hf:{tmp_path / 'rows'}", separate=True, max_bytes=200)
    assert sum(part.bytes for part in few.store.parts.values()) == 200  # type: ignore[union-attr]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.jsonl").write_text(json.dumps({"content": "x"}))
    with pytest.raises(ValueError, match="no column 'text', only content"):
        Text(source=f"hf:{tmp_path / 'other'}", separate=True)
