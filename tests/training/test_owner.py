"""A folder has one owner; other processes get an error that names it, and locks of dead processes are taken over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from test_fit import quiet
from tiny import tiny_run
from typer.testing import CliRunner, Result

from open_mythos.cli import app
from open_mythos.training.fit import fit
from open_mythos.training.owner import LOCK, owned


def lock(folder: Path, **changes: object) -> None:
    """A lock as another process would have left it."""
    with owned(folder):
        left = json.loads((folder / LOCK).read_text())
    (folder / LOCK).write_text(json.dumps(left | changes))


def own_at_once(folder: Path, n: int = 8) -> tuple[list[str], list[str]]:
    """Of ``n`` threads that start at once: an entry for each that owns the folder, and the errors of the others."""
    owners, refused, start, end = list[str](), list[str](), threading.Barrier(n), threading.Barrier(n)

    def one() -> None:
        start.wait()
        try:
            with owned(folder, lambda message: None):
                owners.append("owner")
                end.wait()
        except ValueError as error:
            refused.append(str(error))
            end.wait()

    threads = [threading.Thread(target=one) for _ in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return owners, refused


def test_of_several_simultaneous_starts_one_owns_the_folder(tmp_path: Path) -> None:
    for _ in range(20):
        owners, refused = own_at_once(tmp_path)
        assert len(owners) == 1 and len(refused) == 7
    assert f"{tmp_path} is in use by process {os.getpid()} of " in refused[0] and "stop it, or choose" in refused[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="cannot check whether a process is alive")
def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    lock(tmp_path, process=dead.pid)
    messages: list[str] = []
    with owned(tmp_path, messages.append):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert len(messages) == 1 and f"process {dead.pid} of " in messages[0] and "taking it over" in messages[0]
    for _ in range(20):
        lock(tmp_path, process=dead.pid)
        assert len(own_at_once(tmp_path)[0]) == 1


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="start times of processes are unknown")
def test_a_process_with_a_reused_process_id_does_not_hold_the_lock(tmp_path: Path) -> None:
    messages: list[str] = []
    lock(tmp_path, started=1)
    with owned(tmp_path, messages.append):
        pass
    killed = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    lock(tmp_path, process=killed.pid, started=int(Path(f"/proc/{killed.pid}/stat").read_text().split()[21]))
    with pytest.raises(ValueError, match=f"process {killed.pid} of"), owned(tmp_path, pytest.fail):
        pass
    killed.kill()
    os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)  # dead, but not reaped yet
    with owned(tmp_path, messages.append):
        pass
    killed.wait()
    assert len(messages) == 2


def test_the_lock_of_another_machine_is_respected(tmp_path: Path) -> None:
    lock(tmp_path, host="elsewhere")
    with pytest.raises(ValueError, match=rf"of elsewhere, since .*if that process has ended, remove {tmp_path / LOCK}"):
        fit(tiny_run(), tmp_path, watch=quiet())
    (tmp_path / LOCK).write_text('{"host": ')
    with pytest.raises(ValueError, match=f"lock is not JSON.*remove {tmp_path / LOCK}"):
        fit(tiny_run(), tmp_path, watch=quiet())


def test_a_run_that_is_refused_creates_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 3 tokens"):
        fit(tiny_run("model.vocab_size=2"), tmp_path / "new", watch=quiet())
    assert not (tmp_path / "new").exists()


def test_a_locked_run_can_be_read_but_not_written_by_other_commands(tmp_path: Path) -> None:
    def mythos(*words: object) -> Result:
        return CliRunner().invoke(app, [*map(str, words)])

    run, small = tmp_path / "run", ("--difficulties", 4, "--loops", 1, "--examples", 2)
    fit(tiny_run("steps=1"), run, watch=quiet())
    with owned(run), owned(tmp_path / "compared"), owned(tmp_path / "gated"):
        for words in (("eval", run, *small), ("report", run, "--difficulty", 2, "--loops", 1)):
            done = mythos(*words)
            assert done.exit_code == 0, done.output
        for words in (
            ("train", "debug", "--out", run, "--resume", "auto"),
            ("train-gate", "parity-tiny", "--steps", 1, "--out", tmp_path / "gated"),
            ("compare", "debug", "--out", tmp_path / "compared"),
            ("demo", "--steps", 1, "--out", run),
        ):
            done = mythos(*words)
            assert done.exit_code == 2 and "is in use by process" in done.output, done.output
