"""Compiles ``decode.c`` once for this machine and loads it."""

from __future__ import annotations

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

from open_mythos.fields import must

SOURCE = Path(__file__).with_name("decode.c")
SOURCES = sorted([SOURCE, *SOURCE.parent.glob("*.h")])
# Of the liberties of -ffast-math only those that no result shows.
FLAGS = [
    "-std=gnu11", "-O3", "-fPIC", "-shared", "-pthread",
    "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
]  # fmt: skip
NATIVE: tuple[list[str], ...] = (["-march=native"], ["-mcpu=native"], [])  # the first that this compiler knows


def compiler() -> list[str] | None:
    """The command of a C compiler: ``$CC``, Python's own, cc, gcc or clang; None if there is none."""
    for command in (os.environ.get("CC"), sysconfig.get_config_var("CC"), "cc", "gcc", "clang"):
        words = shlex.split(command or "")
        if words and shutil.which(words[0]):
            return words
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled code, from the user's cache directory if it is there.

    Raises:
        ValueError: if there is no compiler, or it fails, with its own words; or no source, as in a folder for
            transformers, which brings Python alone.
    """
    must(SOURCE.is_file(), f"compile=True needs {SOURCE.name}, which is in the package only; leave compile out")
    command = compiler()
    if command is None:
        raise ValueError("compile=True needs a C compiler, and none was found; install gcc or clang, or set $CC")
    path = _cache() / f"decode-{_key(command)}.so"
    if not path.is_file():
        _compile(command, path)
    code = ctypes.CDLL(str(path))
    code.mythos_open.restype = ctypes.c_void_p
    return code


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "open_mythos"


def _key(command: list[str]) -> str:
    """Differs wherever the result could: a home directory may be shared by unlike machines."""
    known = [
        *(path.read_bytes() for path in SOURCES),
        shlex.join([*command, *FLAGS]).encode(),
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


def _compile(command: list[str], path: Path) -> None:
    failed = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            made = Path(directory, path.name)
            for native in NATIVE:
                words = [*command, *FLAGS, *native, str(SOURCE), "-o", str(made), "-lm"]
                done = subprocess.run(words, capture_output=True, text=True)
                if done.returncode == 0:
                    os.replace(made, path)  # whole or not at all, whoever else is compiling
                    return
                failed = f"{shlex.join(words)} failed:\n{done.stderr.strip()[-2000:]}"
    except OSError as error:
        failed = f"{error}"
    raise ValueError(f"compile=True could not compile its code; leave compile out, or mend this: {failed}")
