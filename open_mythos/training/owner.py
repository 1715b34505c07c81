"""Lock of a run's folder: two trainings that write to the same folder would destroy each other's files."""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from open_mythos import files

LOCK = "lock"
_held = set[str]()  # locks this process holds; one with its id that is not here was left by an earlier process
_OWNER = {"host": str, "process": int, "started": (int, type(None))}


@contextlib.contextmanager
def owned(folder: Path, log: Callable[[str], None] = print) -> Iterator[None]:
    """Hold ``folder/lock``, so that this process alone writes to ``folder``, which is created if missing.

    A lock left by a dead process of this machine is taken over, with a message to ``log``. Reading needs no lock.

    Raises:
        ValueError: naming the process that writes there, and what to do if it has died on another machine.
        OSError: naming the lock, if it cannot be written.
    """
    is_new, path, mine = not folder.exists(), folder / LOCK, _owner(os.getpid())
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _alone(folder):
            _take(path, mine, log)
            _held.add(os.path.realpath(path))
        try:
            yield
        finally:
            _held.discard(os.path.realpath(path))
            with contextlib.suppress(OSError, ValueError):  # the folder may be gone, or locked by another process now
                if mine["process"] == os.getpid() and files.read_json(path) == mine:
                    path.unlink()
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def _take(path: Path, mine: dict[str, Any], log: Callable[[str], None]) -> None:
    with contextlib.suppress(FileNotFoundError):
        _check_free(path, log)
    partial = path.with_name(f".{LOCK}.{os.getpid()}{files.PARTIAL}")
    try:
        files.write_json(partial, mine)
        try:
            os.link(partial, path)  # atomic: if two processes try, even on two machines, one fails
        except FileExistsError:
            _check_free(path, log)
            raise
        except OSError:  # a file system without hard links
            os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def _check_free(path: Path, log: Callable[[str], None]) -> None:
    """Remove the lock of a dead process; ValueError if its owner may be alive, FileNotFoundError without a lock."""
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
    remove = f"if that process has ended, remove {path}, or choose another folder"
    try:
        owner = files.read_json(path, _OWNER)
    except ValueError as error:
        raise ValueError(f"{path.parent} is in use by an unknown process ({error}); {remove}") from error
    who = f"process {owner['process']} of {owner['host']}, since {since}"
    if owner["host"] != socket.gethostname() or os.name != "posix":
        raise ValueError(f"{path.parent} is in use by {who}; {remove}")
    is_left = owner["process"] == os.getpid() and os.path.realpath(path) not in _held
    if not is_left and _is_there(owner["process"]) and _owner(owner["process"]) == owner:
        raise ValueError(f"{path.parent} is in use by {who}; wait for it, stop it, or choose another folder")
    log(f"{path.parent} was in use by {who}, which has ended without releasing it: taking it over")
    path.unlink()


def _owner(process: int) -> dict[str, Any]:
    """Content of the lock of a process of this machine. Process ids are reused and clocks jump, so ``started``, in
    ticks since the machine booted, tells processes of one id apart; None where the system does not give it."""
    try:
        started = int(_stat(process)[19])
    except (OSError, IndexError, ValueError):
        started = None
    return {"host": socket.gethostname(), "process": process, "started": started}


def _is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
        return _stat(process)[0] != "Z"  # a zombie has ended; its parent has not waited for it
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's, or a system without /proc
        return True


def _stat(process: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on, after the name, which may contain spaces and parentheses."""
    return Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Admit one process of a machine at a time, so that only one takes over the lock of a dead process."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without flock
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
