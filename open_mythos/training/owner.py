"""One folder, one owner: two trainings that write to the same would destroy each other's files."""

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
_held = set[str]()  # locks of this process: a folder may come back with one that was left in it
_OWNER = {"host": str, "process": int, "started": (int, type(None))}


@contextlib.contextmanager
def owned(folder: Path, log: Callable[[str], None] = print) -> Iterator[None]:
    """This process alone writes to ``folder``, made if need be, as ``folder/lock`` tells others.

    The lock of a process of this machine that is no longer there is taken over, which ``log`` is told. Reading needs
    no lock.

    Raises:
        ValueError: saying who writes there, and what to do if it has died on another machine.
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
            with contextlib.suppress(OSError, ValueError):  # the folder may be gone, or another's now
                if mine["process"] == os.getpid() and files.read_json(path) == mine:
                    path.unlink()
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()


def _take(path: Path, mine: dict[str, Any], log: Callable[[str], None]) -> None:
    with contextlib.suppress(FileNotFoundError):
        _check_free(path, log)
    partial = path.with_name(f".{LOCK}.{os.getpid()}{files.PARTIAL}")
    try:
        files.write_json(partial, mine)
        try:
            os.link(partial, path)  # it is there whole, and of two, also on two machines, one fails
        except FileExistsError:
            _check_free(path, log)
            raise
        except OSError:  # a disk without links
            os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def _check_free(path: Path, log: Callable[[str], None]) -> None:
    """Remove the lock of a process that is dead; ValueError for any other, FileNotFoundError for none."""
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
    remove = f"if that has ended, remove {path}; or choose another folder"
    try:
        owner = files.read_json(path, _OWNER)
    except ValueError as error:
        raise ValueError(f"{path.parent} belongs to a process that cannot be told ({error}); {remove}") from error
    who = f"process {owner['process']} of {owner['host']}, since {since}"
    if owner["host"] != socket.gethostname() or os.name != "posix":
        raise ValueError(f"{path.parent} is written to by {who}; {remove}")
    is_left = owner["process"] == os.getpid() and os.path.realpath(path) not in _held
    if not is_left and _is_there(owner["process"]) and _owner(owner["process"]) == owner:
        raise ValueError(f"{path.parent} is written to by {who}; wait for it, stop it, or choose another folder")
    log(f"{path.parent} was written to by {who}, which has ended without a word: it is taken over")
    path.unlink()


def _owner(process: int) -> dict[str, Any]:
    """What a lock says of a process of this machine. Numbers are used again, and clocks jump: ``started``, in ticks
    since the machine's own start, tells two processes apart where the system says it."""
    try:
        started = int(_stat(process)[19])
    except (OSError, IndexError, ValueError):
        started = None
    return {"host": socket.gethostname(), "process": process, "started": started}


def _is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
        return _stat(process)[0] != "Z"  # killed, and nobody asked how it ended
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's, or a system without /proc
        return True


def _stat(process: int) -> list[str]:
    """The fields of a process from its state on; the name before may hold anything."""
    return Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process of a machine at a time, so that of two that find a dead one's lock one takes it over."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a disk that cannot
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
