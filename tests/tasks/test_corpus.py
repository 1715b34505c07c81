"""Sources of text, and which part of it is held out."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from open_mythos.tasks import corpus
from open_mythos.tasks.corpus import PIECE, documents, held_out

MUCH = 1 << 24


def test_stdlib_has_the_standard_library_without_installed_packages() -> None:
    found = documents("stdlib", MUCH)
    assert sum(map(len, found)) > 5_000_000
    assert Path(pytest.__file__).read_text() not in found
    assert Path(dataclasses.__file__).read_text() in found
    assert documents("stdlib", MUCH) is found, "read once per process"


def test_about_a_sixteenth_of_the_text_is_held_out() -> None:
    found = documents("stdlib", MUCH)
    share = sum(len(document) for document in found if held_out(document)) / sum(map(len, found))
    assert 0.01 < share < 0.1


def test_a_single_file_is_split_at_line_ends(tmp_path: Path) -> None:
    text = "".join(f"line {i} é\n" for i in range(3000)) + "no end"
    (tmp_path / "a.txt").write_text(text)
    found = documents(str(tmp_path / "a.txt"), MUCH)
    assert "".join(found) == text
    assert all(document.endswith("\n") for document in found[:-1])
    assert all(PIECE <= len(document.encode()) < PIECE + 20 for document in found[:-1])


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("the weights think deeper. Then, " * 900, (". ",)),
        ("the weights think " * 900, (" ",)),
        ("é漢" * 9000, ("é", "漢")),
    ],
)
def test_a_long_line_is_split_after_a_sentence_a_word_or_a_character(
    tmp_path: Path, text: str, ends: tuple[str, ...]
) -> None:
    """In a single file, and in a folder with no other file."""
    (tmp_path / "a.txt").write_text(text)
    found = documents(str(tmp_path / "a.txt"), MUCH)
    assert "".join(found) == text and len(found) >= 3
    assert all(document.endswith(ends) for document in found[:-1])
    assert all(len(document.encode()) <= 2 * PIECE for document in found)
    assert documents(str(tmp_path), MUCH) == found == documents(f"{tmp_path}/*.txt", MUCH)


def test_one_long_dataset_row_is_split_into_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "".join(f"{i} think deeper, " for i in range(2000))}, {"text": "never read"}]
    monkeypatch.setitem(sys.modules, "datasets", FakeHub(rows))
    found = documents("hf:one/row", 20_000)
    assert "".join(found) == rows[0]["text"][:20_000] and len(found) == 4


def test_blank_documents_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both files and dataset rows."""
    texts = ["one", "", " \n\t", "two", "\n", "  three"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    assert documents(str(tmp_path), MUCH) == ("one", "two", "  three")
    monkeypatch.setitem(sys.modules, "datasets", FakeHub([{"text": None}, *({"text": text} for text in texts)]))
    assert documents("hf:some/rows", MUCH) == ("one", "two", "  three")
    monkeypatch.setitem(sys.modules, "datasets", FakeHub([{"text": ""}]))
    with pytest.raises(ValueError, match="'hf:empty/rows' contains no text"):
        documents("hf:empty/rows", MUCH)


def test_a_directory_and_a_glob_are_read_in_order_without_binaries(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, content in {"b.txt": b"second", "a.md": b"first", "sub/c.txt": b"third", "d.bin": b"\0"}.items():
        (tmp_path / name).write_bytes(content)
    assert documents(str(tmp_path), MUCH) == ("first", "second", "third")
    assert documents(f"{tmp_path}/**/*.txt", MUCH) == ("second", "third")


@pytest.mark.parametrize("content", ["café naïve\n".encode("latin-1"), "words\n".encode("utf-16"), b"\xe2\x82 "])
@pytest.mark.parametrize("n_others", [0, 1])
def test_text_that_is_not_utf_8_is_refused_by_name(tmp_path: Path, content: bytes, n_others: int) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    for i in range(n_others):
        (tmp_path / f"b{i}.txt").write_text("é" * 9)
    with pytest.raises(ValueError, match=r"a\.txt.* is not (UTF-8 .*; convert it|a text file)"):
        documents(str(tmp_path if n_others else tmp_path / "a.txt"), MUCH)


def test_a_character_may_be_cut_by_max_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("é" * 9)
    (tmp_path / "b.txt").write_text("é" * 9)
    assert documents(str(tmp_path), 21) == ("é" * 9, "é\ufffd")


def test_a_changed_file_is_noticed_whatever_its_name(tmp_path: Path) -> None:
    for name in ("a.txt", "notes [1].txt", "what?.txt", "*.txt"):
        path = tmp_path / "texts" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("one")
        before = corpus.state(str(path)), corpus.size(str(path), 0)
        path.write_text("three")
        assert before != (corpus.state(str(path)), corpus.size(str(path), 0)) and before[1] == 3


def test_reading_stops_at_max_bytes(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_text(name * 10)
    assert documents(str(tmp_path), 15) == ("a" * 10, "b" * 5)


def test_without_max_bytes_files_are_read_whole_and_datasets_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        (tmp_path / name).write_text(name * 10)
    monkeypatch.setattr(corpus, "STREAMED", 15)
    monkeypatch.setitem(sys.modules, "datasets", FakeHub([{"text": "x" * 10}] * 3))
    assert sum(map(len, documents(str(tmp_path), 0))) == 30
    assert documents("hf:large/set", 0) == ("x" * 10, "x" * 5)


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"a\0b")
    with pytest.raises(ValueError, match=r"a.bin' is not a text file"):
        documents(str(tmp_path / "a.bin"), MUCH)


def test_a_source_without_text_is_refused(tmp_path: Path) -> None:
    for source in (str(tmp_path), str(tmp_path / "nothing.txt")):
        with pytest.raises(ValueError, match="matches no text file; use 'stdlib', 'hf:NAME', or the path"):
            documents(source, MUCH)


class FakeHub(ModuleType):
    """Stands in for the ``datasets`` package: records its calls, and streams rows or raises."""

    def __init__(self, rows: list[dict[str, Any]], error: Exception | None = None) -> None:
        super().__init__("datasets")
        self.rows, self.error = rows, error
        self.calls: list[Any] = []

    def load_dataset(self, *names: str, **options: Any) -> list[dict[str, Any]]:
        self.calls.append((names, options))
        if self.error:
            raise self.error
        return self.rows


def test_a_hugging_face_dataset_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub([{"text": "one"}, {"text": "two"}, SimpleNamespace()])  # type: ignore[list-item]
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert documents("hf:some/set:part", 6) == ("one", "two"), "and no row is read beyond max_bytes"
    assert hub.calls == [(("some/set", "part"), {"split": "train", "streaming": True})]


@pytest.mark.parametrize(
    ("hub", "message"),
    [
        (
            FakeHub([], ConnectionError("no route")),
            "source='hf:set': no route; check the name and the network",
        ),
        (FakeHub([{"content": "x", "id": 1}]), "it has no column 'text', only content, id"),
        (FakeHub([{"text": ["a", "b"]}]), "its column 'text' holds a list; expected strings"),
    ],
)
def test_hub_errors_and_missing_columns_are_reported(
    monkeypatch: pytest.MonkeyPatch, hub: FakeHub, message: str
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", hub)
    with pytest.raises(ValueError) as error:
        documents("hf:set", MUCH)
    assert message in str(error.value)


def test_a_dataset_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="source='hf:' names no dataset; use 'stdlib', 'hf:NAME'"):
        documents("hf:", MUCH)


def test_a_missing_datasets_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[tasks\]"'):
        documents("hf:set", MUCH)
