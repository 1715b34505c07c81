"""``decode.c``, compiled once for this machine by its own compiler, and loaded."""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from open_mythos.install import cache_dir

SOURCE = Path(__file__).with_name("decode.c")
# Of the liberties of -ffast-math only those that no result shows.
FLAGS = [
    "-std=gnu11", "-O3", "-fPIC", "-pthread",
    "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
]  # fmt: skip
LACKS = "no C"
NATIVE: tuple[list[str], ...] = (["-march=native"], ["-mcpu=native"], [])  # the first that this compiler knows


def compiler() -> list[str] | None:
    """The command of a C compiler: ``$CC``, Python's own, cc, gcc or clang; None if there is none."""
    for command in (os.environ.get("CC"), sysconfig.get_config_var("CC"), "cc", "gcc", "clang"):
        words = shlex.split(command or "")
        if words and shutil.which(words[0]):
            return words
    return None


@functools.cache
def library() -> ctypes.CDLL | str:
    """The compiled code, from the user's cache directory if it is there; or why there is none, in one line.

    What this machine lacks begins with :data:`LACKS`. A failure is kept: a process without a compiler will not get one.
    """
    if not SOURCE.is_file():  # as in a folder for transformers, which brings Python alone
        return f"{SOURCE.name} did not come along; it is in the installed package"
    command = compiler()
    if command is None:
        return f"{LACKS} compiler was found; install gcc or clang, or set $CC"
    words = [*command, *FLAGS]
    path = cache_dir() / f"{SOURCE.stem}-{_key(words)}.so"
    failed = "" if path.is_file() else _compile(words, path)
    if failed:
        return f"{LACKS} {failed}"
    try:
        code = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{LACKS} code that can be loaded: {' '.join(str(error).split())}"
    code.mythos_open.restype = ctypes.c_void_p
    return code


def _key(words: list[str]) -> str:
    """Differs wherever the result could: a home directory may be shared by unlike machines."""
    known = [
        *(path.read_bytes() for path in [SOURCE, *sorted(SOURCE.parent.glob("*.h"))]),
        shlex.join(words).encode(),
        platform.platform().encode(),
        _cpu(),
    ]
    return hashlib.sha256(b"\0".join(known)).hexdigest()[:16]


def _cpu() -> bytes:
    """What ``-march=native`` looks at, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_bytes().split(b"\n\n")[0].splitlines() if info.is_file() else []
    told = [line for line in lines if line.split(b"\t")[0] in (b"model name", b"flags", b"Features", b"CPU part")]
    return b"\n".join(told) or f"{platform.machine()} {platform.processor()}".encode()


def _compile(words: list[str], path: Path) -> str:
    """What is not to be had, and why, in one line; nothing if all went well."""
    failed = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            made = Path(directory, path.name)
            for native in NATIVE:
                command = [*words, *native, "-shared", str(SOURCE), "-o", str(made), "-lm"]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode == 0:
                    os.replace(made, path)  # whole or not at all, whoever else is compiling
                    return ""
                said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
                why = next((line for line in said if "error" in line), said[-1])
                failed = f"compiler that works here: {words[0]} says: {why.strip()}"
    except OSError as error:
        failed = f"code: {error}; OPEN_MYTHOS_CACHE sets the folder that it is kept in"
    return failed
