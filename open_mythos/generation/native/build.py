"""Compiles ``decode.c`` once for this machine, with its own compiler, and loads it."""

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from open_mythos import files
from open_mythos.install import cache_dir

SOURCE = Path(__file__).with_name("decode.c")
# Of -ffast-math only the parts that do not change results.
FLAGS = [
    "-std=gnu11", "-O3", "-fPIC", "-pthread",
    "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
]  # fmt: skip
LACKS = "no C"
NATIVE: tuple[list[str], ...] = (["-march=native"], ["-mcpu=native"], [])  # the first that the compiler accepts is used


def compiler() -> list[str] | None:
    """The command of a C compiler: ``$CC``, Python's own, cc, gcc or clang; None if there is none."""
    for command in (os.environ.get("CC"), sysconfig.get_config_var("CC"), "cc", "gcc", "clang"):
        words = shlex.split(command or "")
        if words and shutil.which(words[0]):
            return words
    return None


@functools.cache
def library() -> ctypes.CDLL | str:
    """The compiled library, from the user's cache directory if it is there; or why there is none, in one line.

    A reason that is this machine's begins with :data:`LACKS`. Failures are cached for the process: it would fail again.
    """
    if not SOURCE.is_file():  # as in an export for transformers, which has only the Python files
        return f"{SOURCE.name} is missing; it comes only with the installed package"
    command = compiler()
    if command is None:
        return f"{LACKS} compiler was found; install gcc or clang, or set $CC"
    words = [*command, *FLAGS]
    try:
        found = _compiled(words, _folder())
        if isinstance(found, str):
            return f"{LACKS} {found}"
        code = ctypes.CDLL(str(found))
    except OSError as error:
        why = " ".join(str(error).split())
        return f"{LACKS} code that can be loaded: {why}; set OPEN_MYTHOS_CACHE to keep it in another folder"
    code.mythos_open.restype = ctypes.c_void_p
    return code


def _folder() -> Path:
    """The folder of compiled code: the user's cache, or a temporary one if other users could write to that."""
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
        is_ours = os.name != "posix" or (found.st_uid == os.getuid() and not found.st_mode & 0o022)
        why = "" if is_ours else "it belongs to another user, or others can write to it"
    except OSError as error:
        why = error.strerror or str(error)
    if not why:
        return folder
    own = tempfile.mkdtemp(prefix="open-mythos-")
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    logging.getLogger("open_mythos").warning(
        "cannot keep compiled code in %s (%s), so every process compiles it again", folder, why
    )
    return Path(own)


def _compiled(words: list[str], folder: Path) -> Path | str:
    """The library's file, whose name ends in the hash of its content; or what went wrong.

    The hash is checked, as loading a truncated file would crash the process.
    """
    name = f"{SOURCE.stem}-{_key(words)}"
    for path in folder.glob(f"{name}-*.so"):
        if path.stem.rpartition("-")[2] == _hash(path.read_bytes()):
            return path
        path.unlink(missing_ok=True)
    return _compile(words, folder, name)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _key(words: list[str]) -> str:
    """A hash of all that the compiled code depends on: different machines may share a home directory."""
    known = [
        *(path.read_bytes() for path in [SOURCE, *sorted(SOURCE.parent.glob("*.h"))]),
        shlex.join(words).encode(),
        platform.platform().encode(),
        _cpu(),
    ]
    return _hash(b"\0".join(known))


def _cpu() -> bytes:
    """What ``-march=native`` depends on, as far as the system reports it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_bytes().split(b"\n\n")[0].splitlines() if info.is_file() else []
    told = [line for line in lines if line.split(b"\t")[0] in (b"model name", b"flags", b"Features", b"CPU part")]
    return b"\n".join(told) or f"{platform.machine()} {platform.processor()}".encode()


def _compile(words: list[str], folder: Path, name: str) -> Path | str:
    """Compile the library; its file, or in one line what is missing and why."""
    failed = ""
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        made = Path(directory, "made.so")
        for native in NATIVE:
            command = [*words, *native, "-shared", str(SOURCE), "-o", str(made), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                content = made.read_bytes()
                path = folder / f"{name}-{_hash(content)}.so"
                files.write(path, content)  # whole or not at all, whoever else is compiling
                return path
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            why = next((line for line in said if "error" in line), said[-1])
            failed = f"compiler that works here: {words[0]} says: {why.strip()}"
    return failed
