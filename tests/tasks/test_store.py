"""Tokens on disk: shards that are read as one array, not kept in memory, and verified against their index."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from open_mythos import install
from open_mythos.tasks import corpus, filling, store
from open_mythos.tasks.filling import tokenised
from open_mythos.tasks.store import INDEX, Tokens, opened
from open_mythos.tasks.text import Text
from open_mythos.tasks.tokenizer import Tokenizer, load


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(60):
        (folder / f"{i:02d}.txt").write_text(f"{i}: the same weights, run again\n" * (1 + i % 7))
    return folder


@pytest.fixture(scope="module")
def shards(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same texts in many small shards."""
    folder = tmp_path_factory.mktemp("made") / "shards"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling, "SHARD", 900)
        patch.setattr(filling, "_AT_ONCE", 200)
        filling.fill(folder, [str(texts)], "bytes")
    return folder


def test_shards_are_read_as_one_array(texts: Path, shards: Path) -> None:
    found, one = opened(shards), tokenised(str(texts), "bytes", 0)
    assert len(list(shards.glob("train-*.bin"))) > 4 and found.parts == one.parts
    for name, tokens in found.tokens.items():
        whole = np.concatenate([np.fromfile(path, "<u2") for path in sorted(shards.glob(f"{name}-*"))])
        assert len(tokens) == len(whole) and tokens.dtype == np.uint16
        assert list(tokens) == whole.tolist() == list(one.tokens[name])
        places = np.random.default_rng(0).integers(0, len(whole), (7, 50))
        assert np.array_equal(tokens[places], whole[places])
        assert np.array_equal(tokens[5:400:3], whole[5:400:3]) and tokens[:0].size == 0
        again = pickle.loads(pickle.dumps(tokens))
        assert np.array_equal(again[:], whole) and len(pickle.dumps(tokens)) < 10_000, (
            "file names are pickled, not their contents"
        )


def test_text_from_shards_has_the_same_rows(texts: Path, shards: Path) -> None:
    one, many = Text(source=str(texts), separate=True), Text(source=str(shards), tokenizer=str(shards), separate=True)
    assert one.fingerprint() == many.fingerprint()
    for mine, other in zip(one.rows(range(90), 24, 1), many.rows(range(90), 24, 1), strict=True):
        assert mine.equal(other)
    with pytest.raises(ValueError, match="can only be read as separate documents; use separate=true"):
        Text(source=str(shards))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc/self/statm")
def test_memory_of_tokens_that_were_read_is_released(tmp_path: Path) -> None:
    n = 1 << 25
    with (tmp_path / "a.bin").open("wb") as file:
        file.truncate(2 * n)
    tokens = Tokens([(tmp_path / "a.bin", n)], np.uint16)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    tokens[: 1 << 10]
    before = resident()
    for start in range(0, n, 1 << 20):
        tokens[np.arange(start, start + (1 << 20), 2048)]  # a token of every page
    assert resident() - before < n // 2, "at most half of 64 MB"


def set_fields(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        (folder / INDEX).write_text(json.dumps(index | values))

    return change


def rename_shard(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["train"][1]["file"] = name
        (folder / INDEX).write_text(json.dumps(index))

    return change


def flip_bit(folder: Path) -> None:
    content = bytearray((folder / "train-00002.bin").read_bytes())
    content[100] ^= 1
    (folder / "train-00002.bin").write_bytes(content)


def link_outside(folder: Path) -> None:
    (folder / "train-00001.bin").rename(folder.parent / "elsewhere.bin")
    (folder / "train-00001.bin").symlink_to(folder.parent / "elsewhere.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "train-00001.bin").unlink(), "train-00001.bin"),
        (
            lambda folder: (folder / "train-00001.bin").write_bytes(b"x"),
            r"train-00001.bin has 1 bytes .* it is damaged",
        ),
        (flip_bit, "train-00002.bin is damaged: its checksum does not match"),
        (link_outside, "train-00001.bin is a link out of its folder"),
        (rename_shard("../elsewhere.bin"), r"tokens.json names '../elsewhere.bin', which is not a file in its folder"),
        (rename_shard("/etc/passwd"), r"tokens.json names '/etc/passwd'"),
        (lambda folder: Tokenizer(ends=False).save(folder), "tokenizer.json is not the tokenizer that made the tokens"),
        (set_fields(dtype="uint32"), "tokens.json has eos=0 and dtype='uint32', unlike its tokenizer"),
        (set_fields(eos=300), "tokens.json has eos=300"),
        (set_fields(held_out=3), "tokens.json: held_out is 3; expected a list"),
    ],
)
def test_damaged_and_inconsistent_folders_are_refused(
    shards: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Text(source=str(folder), tokenizer=str(folder), separate=True)


def test_a_shard_truncated_after_opening_is_reported(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "shards")
    tokens = opened(tmp_path / "shards").tokens["train"]
    (tmp_path / "shards/train-00000.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train-00000.bin has 0 bytes and should have [\d,]+: it is damaged"):
        tokens[:9]


def test_checksums_of_large_folders_are_not_verified(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(shards, tmp_path / "shards")
    flip_bit(tmp_path / "shards")
    assert opened(tmp_path / "shards", read_through=100).parts == opened(shards).parts


def test_tokens_of_another_tokenizer_are_refused(shards: Path, tmp_path: Path) -> None:
    for kind in ("bpe:300", str(tmp_path)):
        Tokenizer(ends=False).save(tmp_path)
        with pytest.raises(ValueError, match=f"shards was not tokenised by '{kind}'; use tokenizer="):
            Text(source=str(shards), tokenizer=kind, separate=True)
    Tokenizer(ends=True).save(tmp_path)
    assert Text(source=str(shards), tokenizer=str(tmp_path), separate=True).eos == 0


def test_the_end_token_of_a_tokenizer_folder_is_used(texts: Path, tmp_path: Path) -> None:
    """Also if tokenizer_config.json sets it."""
    pytest.importorskip("tokenizers")
    from open_mythos.tasks.tokenizer import BytePairs

    BytePairs.trained(300, ["the same weights"]).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<pad>"}')
    task = Text(source=str(texts), tokenizer=str(tmp_path), separate=True)
    assert task.eos == 0 and int((task.tokens[:] == 0).sum()) == 1 + task.store.parts["train"].documents  # type: ignore[union-attr]
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "w"}')
    assert Text(source=str(texts), tokenizer=str(tmp_path), separate=True).eos == load(tmp_path).eos != 0


def test_a_token_cache_of_earlier_versions_is_used(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPEN_MYTHOS_CACHE", str(tmp_path))
    made = tokenised(str(texts), "bytes", 0)
    index = json.loads((made.folder / INDEX).read_text())
    (made.folder / INDEX).unlink()
    old = {}
    for name in store.PARTS:
        (shard,) = index[name]
        (made.folder / shard.pop("file")).rename(made.folder / f"{name}.bin")
        old[name] = shard
    (made.folder / "index.json").write_text(json.dumps(old))
    monkeypatch.setattr(corpus, "stream", pytest.fail)
    assert install.cache_dir() == tmp_path and tokenised(str(texts), "bytes", 0).parts == made.parts
