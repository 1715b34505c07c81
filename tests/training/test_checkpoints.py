"""A checkpoint is whole or not there: torn files, full disks and crashes leave the one before, and say so."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from open_mythos.checkpoint import CheckpointError
from open_mythos.training import checkpoints


def state(value: int) -> dict[str, Any]:
    return {"value": value, "tensor": torch.full((100,), value), "none": None, "list": [1.5, "a"]}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_is_saved_comes_back_and_old_ones_go(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        path = checkpoints.save(tmp_path, step, state(step), keep=2)
    assert names(tmp_path) == ["step_00000002", "step_00000003"]
    loaded = checkpoints.load(path)
    assert (
        loaded["value"] == 3 and torch.equal(loaded["tensor"], torch.full((100,), 3)) and loaded["list"] == [1.5, "a"]
    )


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("state.pt", cut_short, "state.pt has .* bytes of the .* in its manifest"),
        ("state.pt", flip_a_bit, "state.pt is damaged: its checksum"),
        ("state.pt", Path.unlink, "state.pt cannot be read .No such file"),
        ("manifest.json", Path.unlink, "manifest.json is missing: the checkpoint was not finished"),
        ("manifest.json", cut_short, "manifest.json is damaged"),
        ("manifest.json", lambda path: path.write_text("[]"), "manifest.json is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_and_said(tmp_path: Path, file: str, damage: Any, message: str) -> None:
    checkpoints.save(tmp_path, 1, state(1), keep=2)
    torn = checkpoints.save(tmp_path, 2, state(2), keep=2)
    damage(torn / file)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(torn)
    said: list[str] = []
    found = checkpoints.newest(tmp_path, said.append)
    assert found is not None and found[1]["value"] == 1
    assert len(said) == 1 and "skipping checkpoint step_00000002" in said[0]
    checkpoints.save(tmp_path, 2, state(2), keep=2)  # made again in its place
    assert checkpoints.load(torn)["value"] == 2


def test_none_is_found_where_there_is_none(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path / "nowhere", print) is None


@pytest.mark.parametrize("broken", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_checkpoints_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    checkpoints.save(tmp_path, 1, state(1), keep=1)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((Path, "write_bytes") if broken == "write" else (os, broken)), full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(tmp_path, 2, state(2), keep=1)
    assert names(tmp_path) == ["step_00000001"]
    assert checkpoints.load(tmp_path / "step_00000001")["value"] == 1


def test_what_a_crash_left_half_written_is_neither_loaded_nor_counted(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, 1, state(1), keep=2)
    (tmp_path / "step_00000009.partial").mkdir()
    (tmp_path / "step_00000009.partial" / "state.pt").write_bytes(b"half")
    found = checkpoints.newest(tmp_path, pytest.fail)
    assert found is not None and found[1]["value"] == 1
    checkpoints.save(tmp_path, 2, state(2), keep=2)
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


def test_nothing_but_data_is_loaded(tmp_path: Path) -> None:
    path = checkpoints.save(tmp_path, 1, {"trap": Path("/")}, keep=1)
    with pytest.raises(CheckpointError, match=r"state.pt cannot be read"):
        checkpoints.load(path)
    assert json.loads((path / "manifest.json").read_text())["step"] == 1
