"""A checkpoint is complete or absent: after damage, a full disk or a crash the previous one is used, with a message."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from open_mythos.checkpoint import CheckpointError
from open_mythos.training import checkpoints, distributed


def state(value: int) -> dict[str, Any]:
    return {"value": value, "tensor": torch.full((100,), value), "none": None, "list": [1.5, "a"]}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_saved_state_is_loaded_and_old_checkpoints_are_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        path = checkpoints.save(tmp_path, step, state(step), keep=2)
    assert names(tmp_path) == ["step_00000002", "step_00000003"]
    loaded = checkpoints.load(path)
    assert (
        loaded["value"] == 3 and torch.equal(loaded["tensor"], torch.full((100,), 3)) and loaded["list"] == [1.5, "a"]
    )


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("state.pt", truncate, "state.pt has .* bytes, not the .* of its manifest"),
        ("state.pt", flip_a_bit, "state.pt is damaged: its checksum"),
        ("state.pt", Path.unlink, "state.pt cannot be read .No such file"),
        ("manifest.json", Path.unlink, "manifest.json is missing: the checkpoint was not finished"),
        ("manifest.json", truncate, "manifest.json is damaged"),
        ("manifest.json", lambda path: path.write_text("[]"), "manifest.json is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_a_message(tmp_path: Path, file: str, damage: Any, message: str) -> None:
    checkpoints.save(tmp_path, 1, state(1), keep=2)
    torn = checkpoints.save(tmp_path, 2, state(2), keep=2)
    damage(torn / file)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(torn)
    messages: list[str] = []
    found = checkpoints.newest(tmp_path, messages.append)
    assert found is not None and found[1]["value"] == 1
    assert len(messages) == 1 and "skipping checkpoint step_00000002" in messages[0]
    checkpoints.save(tmp_path, 2, state(2), keep=2)  # saved again over the damaged one
    assert checkpoints.load(torn)["value"] == 2


def test_newest_returns_none_without_checkpoints(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path / "nowhere", print) is None


@pytest.mark.parametrize("broken", ["write", "fsync", "replace"])
def test_a_full_disk_keeps_the_earlier_checkpoints(
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


def test_a_partial_checkpoint_of_a_crash_is_neither_loaded_nor_kept(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, 1, state(1), keep=2)
    (tmp_path / "step_00000009.partial").mkdir()
    (tmp_path / "step_00000009.partial" / "state.pt").write_bytes(b"half")
    found = checkpoints.newest(tmp_path, pytest.fail)
    assert found is not None and found[1]["value"] == 1
    checkpoints.save(tmp_path, 2, state(2), keep=2)
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


def test_a_checkpoint_with_pickled_objects_is_refused(tmp_path: Path) -> None:
    path = checkpoints.save(tmp_path, 1, {"trap": Path("/")}, keep=1)
    with pytest.raises(CheckpointError, match=r"state.pt cannot be read"):
        checkpoints.load(path)
    assert json.loads((path / "manifest.json").read_text())["step"] == 1


# -- several processes

WHOLE = torch.arange(35.0).view(7, 5)
ROWS = {2: ((0, 4), (4, 7)), 3: ((0, 3), (3, 6), (6, 7))}
Run = Callable[[Callable[[int], Any]], list[Any]]


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Calls a function of the rank in two processes, simulated by threads; gives what each returned or raised."""
    own, meeting, given = threading.local(), threading.Barrier(2), list[Any]([None, None])

    def gathered(mine: Any, group: Any = None) -> list[Any]:
        meeting.wait(20)
        given[own.rank] = mine
        meeting.wait(20)
        found = list(given)
        meeting.wait(20)
        return found

    def run(work: Callable[[int], Any]) -> list[Any]:
        found: list[Any] = [None, None]

        def one(rank: int) -> None:
            own.rank = rank
            try:
                found[rank] = work(rank)
            except Exception as error:
                found[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(2)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distributed, "gathered", gathered)
            patch.setattr(distributed, "rank", lambda: own.rank)
            patch.setattr(distributed, "world_size", lambda: 2)
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return found

    return run


def sharded_state(rank: int, value: int = 0, n: int = 2) -> dict[str, Any]:
    """A state in which each process holds some rows of one tensor, and the first process all of another."""
    first, end = ROWS[n][rank]
    rows = checkpoints.Part(WHOLE[first:end] + value, (7, 5), (first, 0), True)
    both = checkpoints.Part(WHOLE[0] + value, (5,), (0,), rank == 0)
    return {
        "step": value,
        "list": [{"rows": rows}],
        "both": both,
        "row": {rank: checkpoints.Part(WHOLE[rank], (5,), (0,), True)},
    }


def save_from_two(two_processes: Run, folder: Path, value: int, keep: int = 2) -> Path:
    paths = two_processes(lambda rank: checkpoints.save(folder, value, sharded_state(rank, value), keep))
    assert paths[0] == paths[1]
    return paths[0]


def test_any_slice_of_a_sharded_tensor_loads_on_any_number_of_processes(tmp_path: Path, two_processes: Run) -> None:
    path = save_from_two(two_processes, tmp_path, 1)
    assert names(path) == ["manifest.json", "pieces_00000.safetensors", "pieces_00001.safetensors", "state.pt"]
    for state in (checkpoints.load(path), *two_processes(lambda rank: checkpoints.load(path))):
        rows = state["list"][0]["rows"]
        assert state["step"] == 1 and torch.equal(state["both"][()], WHOLE[0] + 1) and state["row"].keys() == {0, 1}
        for first, end in ((0, 7), (3, 5), (5, 7), (4, 4)):
            where = slice(first, end), slice(1, 3)
            assert torch.equal(rows[where], WHOLE[where] + 1)
        assert torch.equal(rows[()], WHOLE + 1) and torch.equal(state["row"][1][()], WHOLE[1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "pieces_00001.safetensors has .* bytes, not the .* of its manifest"),
        (flip_a_bit, "pieces_00001.safetensors is damaged: its checksum"),
        (Path.unlink, "pieces_00001.safetensors cannot be read .No such file"),
    ],
)
def test_all_processes_use_the_previous_checkpoint_if_one_shard_is_damaged(
    tmp_path: Path, two_processes: Run, damage: Callable[[Path], None], message: str
) -> None:
    save_from_two(two_processes, tmp_path, 1)
    damage(save_from_two(two_processes, tmp_path, 2) / "pieces_00001.safetensors")
    messages: list[str] = []
    found = two_processes(
        lambda rank: checkpoints.newest(tmp_path, messages.append if rank == 0 else lambda message: None)
    )
    assert [state["step"] for _, state in found] == [1, 1]
    (line,) = messages
    assert line.startswith("skipping checkpoint step_00000002: ")
    with pytest.raises(CheckpointError, match=message):
        raise CheckpointError(line)


def test_a_full_disk_of_one_process_fails_all_and_keeps_the_last_checkpoint(
    tmp_path: Path, two_processes: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_from_two(two_processes, tmp_path, 1)
    write = checkpoints.weights.write

    def full(path: Path, tensors: Any) -> None:
        if path.name == "pieces_00001.safetensors":
            raise OSError(28, "No space left on device", str(path))
        write(path, tensors)

    monkeypatch.setattr(checkpoints.weights, "write", full)
    for error in two_processes(lambda rank: checkpoints.save(tmp_path, 2, sharded_state(rank, 2), 1)):
        assert isinstance(error, OSError) and "process 1: " in str(error) and "pieces_00001" in str(error)
    assert names(tmp_path) == ["step_00000001"]


def test_a_tensor_with_missing_shards_is_refused_before_allocation(tmp_path: Path) -> None:
    part = checkpoints.Part(WHOLE, (1 << 50, 5), (0, 0), True)
    state = checkpoints.load(checkpoints.save(tmp_path, 1, {"part": part}, 1))
    with pytest.raises(CheckpointError, match=r"part is incomplete in .*pieces_00000"):
        state["part"][()]


@pytest.mark.parametrize("file", ["../step_00000001/pieces_00000.safetensors", "other.safetensors"])
def test_an_index_may_name_only_files_that_the_manifest_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    at = [{"file": file, "start": [0], "size": [5]}]
    path = checkpoints.save(tmp_path, 1, {"pieces": [{"path": ["part"], "shape": [5], "at": at}]}, 1)
    with pytest.raises(
        CheckpointError, match=r"state.pt cannot be read \(it refers to .*, which .*manifest.json does not"
    ):
        checkpoints.load(path)


def test_the_newest_checkpoints_and_one_per_period_are_kept(tmp_path: Path) -> None:
    for step in range(1, 10):
        checkpoints.save(tmp_path, step, {"meter": {"seconds": 1800.0 * step}}, 2, hours=1.5)
    assert [int(name[-2:]) for name in names(tmp_path)] == [1, 3, 6, 8, 9]


def test_a_copy_under_another_name_is_neither_loaded_nor_removed(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, 4, {"x": 4}, keep=1)
    shutil.copytree(tmp_path / "step_00000004", tmp_path / "step_00000004-good")
    checkpoints.save(tmp_path, 8, {"x": 8}, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000004-good", "step_00000008"]
    assert [path.name for path in checkpoints.newest_first(tmp_path)] == ["step_00000008"]
