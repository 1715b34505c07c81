"""Tokenising text into shards: the same for any number of processes, and resumed after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from open_mythos.tasks import filling
from open_mythos.tasks.corpus import held_out
from open_mythos.tasks.filling import fill
from open_mythos.tasks.store import opened

DOCUMENTS = [f"{i}: naïve words, {'and more of them, ' * (i % 9)}\n" for i in range(200)]
KILLED = """
import os, signal, sys
from open_mythos.tasks import filling

filling.SHARD, filling._AT_ONCE = 6000, 1500
def tell(done):
    if done > 10_000:
        os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    filling.fill(filling.Path(sys.argv[1]), [sys.argv[2]], "bytes", workers=2, tell=tell)
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("texts")
    for i, document in enumerate(DOCUMENTS):
        (folder / f"{i:03d}.txt").write_text(document)
    return str(folder)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "SHARD", 6000)
    monkeypatch.setattr(filling, "_AT_ONCE", 1500)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(texts: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The complete shards, made by this process."""
    folder = tmp_path_factory.mktemp("whole") / "tokens"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling, "SHARD", 6000)
        patch.setattr(filling, "_AT_ONCE", 1500)
        assert fill(folder, [texts], "bytes") == 0
    return content(folder)


@pytest.mark.parametrize("shard", [1, 6000])
def test_parts_are_documents_separated_by_end_tokens(
    texts: str, whole: dict[str, bytes], tmp_path: Path, shard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where many shards have documents of one part only."""
    monkeypatch.setattr(filling, "SHARD", shard)
    monkeypatch.setattr(filling, "_AT_ONCE", min(shard, 1500))
    documents = DOCUMENTS[60:100] if shard == 1 else DOCUMENTS
    fill(tmp_path / "tokens", [texts if shard > 1 else f"{texts}/0[6-9]*.txt"], "bytes")
    for name, tokens in opened(tmp_path / "tokens").tokens.items():
        stream = [0]
        for document in documents:
            if held_out(document) == (name == "held_out"):
                stream += [*(1 + byte for byte in document.encode()), 0]
        assert list(tokens) == stream
    assert len([name for name in whole if name.startswith("train-")]) >= 3


def test_a_killed_fill_resumes_with_another_number_of_processes(
    texts: str, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """The killed run has two worker processes, which end with it."""
    (tmp_path / "killed.py").write_text(KILLED)
    words = [sys.executable, str(tmp_path / "killed.py"), str(tmp_path / "tokens"), texts]
    done = subprocess.run(words, stderr=subprocess.PIPE, text=True, timeout=300)  # waits for the workers too
    assert done.returncode == -signal.SIGKILL, done.stderr
    partial = content(tmp_path / "tokens")
    is_half = 0 < sum(name.endswith(".bin") for name in partial) < sum(name.endswith(".bin") for name in whole)
    assert is_half and partial.items() - whole.items() <= {("tokens.json", partial["tokens.json"])} | {
        item for item in partial.items() if item[0].startswith(".")
    }
    progress: list[int] = []
    resumed_at = fill(tmp_path / "tokens", [texts], "bytes", tell=progress.append)
    assert progress[0] == resumed_at > 5_000 and progress == sorted(progress)
    assert content(tmp_path / "tokens") == whole


def test_a_fill_from_other_sources_is_not_resumed(texts: str, whole: dict[str, bytes], tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(done: int) -> None:
        if done > 10_000:
            raise Stopped

    with pytest.raises(Stopped):
        fill(tmp_path / "tokens", [texts, texts], "bytes", tell=stop)
    assert fill(tmp_path / "tokens", [texts], "bytes") == 0
    assert content(tmp_path / "tokens") == whole


def test_several_sources_are_concatenated(texts: str, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("what comes behind\n" * 900)
    fill(tmp_path / "tokens", [texts, str(tmp_path / "more.txt")], "bytes")
    made = opened(tmp_path / "tokens")
    assert (
        made.parts["train"].bytes + made.parts["held_out"].bytes
        == sum(len(text.encode()) for text in DOCUMENTS) + 16200
    )
    assert made.tokenizer.decode(made.tokens["train"][-300:]).endswith("what comes behind\n")


@pytest.mark.parametrize("shard", [1, 1 << 20])
def test_the_last_document_is_held_out_if_no_other_is(
    shard: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "SHARD", shard)
    monkeypatch.setattr(filling, "_AT_ONCE", 1)
    (tmp_path / "few").mkdir()
    words = [f"{i}" for i in range(50) if not held_out(f"{i}")][:5]
    for i, word in enumerate(words):
        (tmp_path / f"few/{i}.txt").write_text(word)
    fill(tmp_path / "tokens", [str(tmp_path / "few")], "bytes")
    found = opened(tmp_path / "tokens")
    assert found.tokenizer.decode(found.tokens["train"]) == "".join(words[:-1])
    assert found.tokenizer.decode(found.tokens["held_out"]) == words[-1]


def test_errors_of_worker_processes_are_raised(tmp_path: Path, texts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pipe:
        def __init__(self, answer: object) -> None:
            self.answer = answer

        def recv(self) -> object:
            if self.answer is None:
                raise EOFError
            return self.answer

    with pytest.raises(ValueError, match="no such token"):
        filling._answer(Pipe(ValueError("no such token")))  # type: ignore[arg-type]
    with pytest.raises(MemoryError, match="a tokenising process was killed"):
        filling._answer(Pipe(None))  # type: ignore[arg-type]


def test_byte_pair_tokens_are_stored_as_uint16(texts: str, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    fill(tmp_path / "tokens", [texts], "bpe:300")
    found = opened(tmp_path / "tokens")
    text = "".join(document for document in DOCUMENTS if not held_out(document))
    assert found.tokenizer.decode(found.tokens["train"]) == text and len(found.tokenizer.pieces) <= 300
    size = sum(os.path.getsize(path) for path in (tmp_path / "tokens").glob("train-*"))
    assert size == 2 * len(found.tokens["train"]) and np.dtype(found.tokens["train"].dtype).itemsize == 2
