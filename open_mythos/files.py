"""Writing files whole or not at all, and reading files that may be damaged, huge or hostile.

Everything that the library writes goes through :func:`replacing`; everything that it reads from a folder that somebody
else may have made goes through :func:`read_bytes` or what is built on it, which look at a file's size first.
"""

import contextlib
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL = ".partial"
_HUGE = 1 << 63
MOST = 1 << 26  # bytes of the largest text file that is read; tokenizers of 250,000 tokens have half of that
_NAMES = {
    dict: "an object of names and values", list: "a list", str: "a string", int: "a whole number", float: "a number",
    bool: "true or false", type(None): "null",
}  # fmt: skip


# -- writing


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file beside ``path``, which is fsynced and replaces it when the block ends without an error.

    Otherwise it is removed, and what was at ``path`` stays. The permissions are those of a newly created file.

    Raises:
        OSError: naming ``path``, if it cannot be written, as on a full disk.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except OSError as error:  # which names no file, or the temporary one
        raise OSError(error.errno or 0, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: str | Path, room: int = 0) -> Iterator[Path]:
    """A temporary folder, whose files are fsynced and moved into ``path`` when the block ends without an error.

    A new ``path`` appears whole or not at all; in an existing one each file does. For files only, not subfolders.

    Args:
        path: the folder.
        room: bytes that will be written at least; whether the disk has them is checked before any work is done.

    Raises:
        OSError: naming ``path``, if it cannot be written.
    """
    path = Path(path)
    is_new = not path.exists()
    partial = (path.parent if is_new else path) / f".{path.name}.{os.getpid()}{PARTIAL}"
    shutil.rmtree(partial, ignore_errors=True)  # left by an earlier process of the same id
    try:
        partial.mkdir(parents=True)
        if room and hasattr(os, "posix_fallocate"):
            with (partial / "room").open("wb") as reserved:
                os.posix_fallocate(reserved.fileno(), 0, room)
            (partial / "room").unlink()
        yield partial
        made = list(partial.iterdir())
        for file in (*made, partial):
            sync(file)
        if is_new:
            os.replace(partial, path)
        for file in () if is_new else made:
            os.replace(file, path / file.name)
        sync(path.parent if is_new else path)
    except OSError as error:
        raise OSError(error.errno or 0, error.strerror or str(error), str(path)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_partial(path: Path) -> bool:
    """Whether ``path`` is a temporary file or folder of this module's, as a killed process leaves behind."""
    return path.name.endswith(PARTIAL)


def write(path: str | Path, content: str | bytes | memoryview) -> None:
    """Write a file whole, as :func:`replacing` does; a string in UTF-8."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: str | Path, data: Any, indent: int = 1) -> None:
    """Write ``data`` as JSON, as :func:`write` does."""
    write(path, json.dumps(data, indent=indent) + "\n")


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk."""
    if path.is_dir() and os.name != "posix":  # elsewhere folders cannot be opened
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -- reading


def opened(path: Path) -> BinaryIO:
    """Open an ordinary file for reading, without blocking on a named pipe. Errors as :func:`read_bytes`."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{path} is not a regular file")
    return file


def read_bytes(path: Path, most: int = MOST) -> bytes:
    """The content of an ordinary file of at most ``most`` bytes.

    Raises:
        FileNotFoundError: if there is none.
        OSError: if it cannot be read.
        ValueError: naming it, if it is no ordinary file, or larger.
    """
    with opened(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise ValueError(f"{path} has {size:,} bytes, but at most {most:,} are read from such a file")
        return file.read(most)


def read_text(path: Path, most: int = MOST) -> str:
    """As :func:`read_bytes`, and ValueError for what is not UTF-8."""
    try:
        return read_bytes(path, most).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def read_json(path: Path, shape: Any = dict, most: int = MOST) -> Any:
    """The JSON value in a file. Errors as :func:`read_text`, or ValueError if it does not fit (:func:`shaped`)."""
    return parse_json(read_text(path, most), str(path), shape)


def parse_json(text: str | bytes, name: str, shape: Any = dict) -> Any:
    """The value in JSON ``text``; ValueError with ``name`` unless it is JSON and fits ``shape``, see :func:`shaped`."""
    try:
        data = json.loads(text)
    except RecursionError:
        raise ValueError(f"{name} is JSON that is nested too deeply to be read") from None
    except ValueError as error:
        raise ValueError(f"{name} is not JSON ({error})") from error
    return shaped(data, shape, name)


def shaped(value: Any, shape: Any, name: str) -> Any:
    """``value``, if it has the shape that is expected.

    Args:
        shape: a type; a list of one shape, for lists of any length; a dict of shapes, whose keys are required unless
            they end in "?" (other keys are allowed, and have the shape under "*" if there is one); or a tuple of
            shapes of different types, of which one must fit.
        name: of the value, for the message.

    Raises:
        ValueError: naming the field at fault, its value, and what was expected.
    """
    if isinstance(shape, dict):
        others = dict.fromkeys(shaped(value, dict, name), shape["*"]) if "*" in shape else {}
        for key, part in (others | {key: part for key, part in shape.items() if key != "*"}).items():
            plain = key.removesuffix("?") if key in shape else key
            if plain in shaped(value, dict, name):
                shaped(value[plain], part, f"{name}: {plain}")
            elif plain == key:
                raise ValueError(f"{name} lacks {key!r}")
    elif isinstance(shape, list):
        for i, item in enumerate(shaped(value, list, name)):
            shaped(item, shape[0], f"{name}[{i}]")
    else:
        parts = shape if isinstance(shape, tuple) else (shape,)
        kinds = tuple(part if isinstance(part, type) else type(part) for part in parts)
        known = (*kinds, int) if float in kinds else kinds
        is_huge = isinstance(value, int) and not -_HUGE < value < _HUGE  # beyond int64
        if isinstance(value, float) and not math.isfinite(value):  # no JSON, but Python's parser accepts NaN, Infinity
            raise ValueError(f"{name} is {value}; expected a finite number")
        if not isinstance(value, known) or (isinstance(value, bool) and bool not in kinds) or is_huge:
            came = f"{value!r:.40}" if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
            raise ValueError(f"{name} is {came}; expected {' or '.join(_NAMES[kind] for kind in kinds)}")
        for part in parts:
            if not isinstance(part, type) and isinstance(value, type(part)):
                shaped(value, part, name)
    return value


def real(path: Path) -> Path:
    """``path`` with its links resolved, as far as it exists; one of the links if they form a circle."""
    return Path(os.path.realpath(path))  # Path.resolve raises RuntimeError for these, in some versions of Python


def inside(folder: Path, name: Any, by: str) -> Path:
    """The file ``name`` directly in ``folder``, as ``by`` refers to it; ValueError for a name that leads out of it."""
    if not isinstance(name, str) or not name or name in (".", "..") or set(name) & set("/\\\0:"):
        raise ValueError(f"{by} names {name!r:.60}, which is not a file in its folder")
    return own(folder / name)


def own(path: Path) -> Path:
    """``path``, unless it is a link that leads out of its folder, which somebody else may have made.

    Links in a Hugging Face cache may lead to its own blobs.

    Raises:
        ValueError: naming it and where it leads.
    """
    folder, place = real(path.parent), real(path)
    is_blob = place.parent.name == "blobs" and folder.is_relative_to(place.parent.parent)
    if not place.is_relative_to(folder) and not is_blob:
        raise ValueError(f"{path} is a link out of its folder, to {place}; replace it with the file itself")
    return path
