"""Runs under failures of the machine: full or vanished disks, no memory, non-finite losses, kills, clock changes."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fit import assert_same_run, metrics, quiet
from test_trainer import spoil
from tiny import tiny_run

from open_mythos.training import checkpoints
from open_mythos.training.config import TrainConfig
from open_mythos.training.fit import Watch, fit
from open_mythos.training.loggers import read_metrics
from open_mythos.training.objective import Objective
from open_mythos.training.trainer import TrainingError

LONG = bool(os.environ.get("OPEN_MYTHOS_LONG"))
_WRITES = {"os.mkdir", "os.rename", "os.link"}
_disk: dict[str, Any] = {"under": None}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run to compare with."""
    run = tmp_path_factory.mktemp("whole") / "run"
    fit(tiny_run(), run, watch=quiet())
    return run


def _audit(event: str, args: tuple[Any, ...]) -> None:
    """Makes system calls that need disk space fail, from a certain one on."""
    under = _disk["under"]
    if under is None or not (event in _WRITES or (event == "open" and isinstance(args[2], int) and args[2] & 3)):
        return
    if str(args[0]).startswith(under):
        count_write(str(args[0]))


def count_write(path: str) -> None:
    _disk["count"] += 1
    if _disk["count"] >= _disk["first"]:
        raise OSError(errno.ENOSPC, "No space left on device", path)


@contextmanager
def full_disk(under: Path, first: int) -> Iterator[None]:
    """Within this context, write number ``first`` below a folder and all later ones fail."""
    if "hook" not in _disk:
        sys.addaudithook(_audit)
        _disk["hook"] = True
    _disk.update(under=str(under), first=first, count=0)
    try:
        yield
    finally:
        _disk["under"] = None


def test_a_run_resumes_exactly_after_the_disk_was_full_at_any_write(tmp_path: Path) -> None:
    """With ``OPEN_MYTHOS_LONG=1``: at every write."""
    cfg = tiny_run("steps=20", "save_every=5", "model.prelude_layers=1", "model.n_experts=2", "evaluation.loops=1")
    with full_disk(tmp_path, 10**9):
        fit(cfg, tmp_path / "whole", watch=quiet())
        n_writes = _disk["count"]
    assert n_writes > 50
    for first in range(1, n_writes + 1) if LONG else (1, 3, 23, n_writes - 4, n_writes):
        run, messages = tmp_path / "run", list[str]()
        with full_disk(run, first), pytest.raises(OSError, match="No space left") as failed:
            fit(cfg, run, watch=quiet(messages))
        assert str(run) in str(failed.value), "the error names the file"
        assert not [path for path in tmp_path.rglob("*.partial")]
        for checkpoint in checkpoints.newest_first(run / "checkpoints"):
            checkpoints.load(checkpoint)
        fit(cfg, run, "auto", quiet())
        assert metrics(run) == metrics(tmp_path / "whole")
        for name in ("model/model.safetensors", "model/config.json", "model/training.json", "evaluation.json"):
            assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (first, name)
        shutil.rmtree(run)


def test_a_disk_that_is_full_for_a_while_does_not_change_the_run(tmp_path: Path, undisturbed: Path) -> None:
    messages: list[str] = []

    def record(line: Any) -> None:
        _disk["under"] = str(tmp_path / "run") if line["step"] in (3, 4, 7, 8) else None

    with full_disk(tmp_path / "run", 1):
        _disk["under"] = None
        fit(tiny_run(), tmp_path / "run", watch=Watch(record, messages.append))
    assert "step 4: metrics not written" in messages[0] and "metrics.jsonl" in messages[0]
    assert "step 4: checkpoint not written" in messages[1] and "step 8: checkpoint not written" in messages[-2]
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_run_folder_that_vanishes_is_reported_and_not_created_again(tmp_path: Path, undisturbed: Path) -> None:
    run, messages = tmp_path / "run", list[str]()

    def record(line: Any) -> None:
        if line["step"] == 6:
            run.rename(tmp_path / "away")

    with pytest.raises(OSError, match=r"metrics.jsonl"):
        fit(tiny_run(), run, watch=Watch(record, messages.append))
    assert not run.exists() and "metrics not written" in messages[0]
    (tmp_path / "away").rename(run)
    fit(tiny_run(), run, "auto", quiet())
    assert_same_run(run, undisturbed)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("not enough"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_running_out_of_memory_names_the_checkpoint_to_resume_from(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    call, calls = Objective.__call__, [0]

    def full(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 7:
            raise error
        return call(*args)

    monkeypatch.setattr(Objective, "__call__", full)
    with pytest.raises(TrainingError, match=rf"out of memory \({error}.*step_00000004 is saved; continue from it"):
        fit(tiny_run(), tmp_path / "run", watch=quiet())
    fit(tiny_run(), tmp_path / "run", "auto", quiet())
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_system_clock_that_jumps_has_no_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    fit(tiny_run(), tmp_path, watch=quiet())
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert len(lines) == 12 and all(line["seconds"] > 0 and line["tokens_per_second"] > 0 for line in lines)


def test_a_run_that_diverges_keeps_its_last_finite_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, *range(5, 12))
    with pytest.raises(TrainingError) as stopped:
        fit(tiny_run("save_every=1", "keep=1", "max_bad_steps=4"), tmp_path, watch=quiet())
    kept = tmp_path / "checkpoints/step_00000005"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [kept.name]
    error = str(stopped.value)
    assert "up to step 9" in error and "non-finite gradients of embed.weight, " in error and f"{kept} is saved" in error
    state = checkpoints.load(kept)["trainer"]
    assert state["skipped"] == [0, 0] and all(tensor.isfinite().all() for tensor in state["model"].values())


def test_a_checkpoint_due_at_a_skipped_step_is_saved_at_the_next_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 3, 4)
    fit(tiny_run("keep=9"), tmp_path, watch=quiet())
    names = sorted(path.name[-2:] for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["06", "08", "12"]


def test_resuming_from_an_earlier_checkpoint_removes_the_later_ones(tmp_path: Path) -> None:
    fit(tiny_run("keep=3"), tmp_path / "run", watch=quiet())
    fit(tiny_run("keep=1"), tmp_path / "run", str(tmp_path / "run/checkpoints/step_00000004"), quiet())
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000012"]
    fit(tiny_run("keep=1"), tmp_path / "whole", watch=quiet())
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_keep_hours_keeps_older_checkpoints_beside_the_newest(tmp_path: Path) -> None:
    fit(tiny_run("keep=1", "keep_hours=1e-9", "evaluation.loops=1"), tmp_path, watch=quiet())
    names = sorted(path.name[-2:] for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["04", "08", "12"]


def test_a_run_resumes_when_its_config_file_is_truncated(tmp_path: Path) -> None:
    cfg, messages = tiny_run("steps=4"), list[str]()
    fit(cfg, tmp_path, watch=quiet())
    (tmp_path / "config.json").write_text('{"model": {')
    fit(cfg, tmp_path, "auto", quiet(messages))
    assert "config.json" in messages[0] and TrainConfig.load(tmp_path / "config.json") == cfg
    (tmp_path / "config.json").write_text('{"model": {')
    with pytest.raises(ValueError, match=r"other settings: optim\.lr"):
        fit(tiny_run("steps=4", "optim.lr=0.5"), tmp_path, "auto", quiet())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.timeout(3600 if LONG else 420)
def test_work_killed_at_random_moments_ends_as_if_undisturbed(tmp_path: Path) -> None:
    """With ``OPEN_MYTHOS_LONG=1``: at 300 moments."""
    script, moments = Path(__file__).with_name("killing.py"), "300" if LONG else "30"
    done = subprocess.run([sys.executable, script, tmp_path, moments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    print(done.stdout)
