"""C code of this package, compiled once for this machine by its own compiler, and loaded."""

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

_HERE = Path(__file__).parent
# Of the liberties of -ffast-math only those that no result shows.
FLAGS = [
    "-std=gnu11", "-O3", "-fPIC", "-pthread",
    "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", f"-I{_HERE}",
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
def library(source: Path, *flags: str) -> ctypes.CDLL:
    """The compiled code of a C file and the headers beside it, from the user's cache directory if it is there.

    With ``-fopenmp`` among the flags its threads are PyTorch's own: OpenMP's functions are not linked, and so are those
    that PyTorch has brought into the process.

    Raises:
        ValueError: if there is no compiler, or it fails, with its own words; or no source, as in a folder for
            transformers, which brings Python alone.
    """
    must(source.is_file(), f"{source.name} is in the package only; install it, or do without compiled code")
    command = compiler()
    if command is None:
        raise ValueError("compiled code needs a C compiler, and none was found; install gcc or clang, or set $CC")
    words = [*command, *FLAGS, *flags]
    path = _cache() / f"{source.stem}-{_key(words, source)}.so"
    if not path.is_file():
        _compile(words, source, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise ValueError(f"{source.name} was compiled, but could not be loaded: {error}") from error


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "open_mythos"


def _key(words: list[str], source: Path) -> str:
    """Differs wherever the result could: a home directory may be shared by unlike machines."""
    known = [
        *(path.read_bytes() for path in [source, *sorted(source.parent.glob("*.h")), *_HERE.glob("*.h")]),
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


def _compile(words: list[str], source: Path, path: Path) -> None:
    failed = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            made, linked = Path(directory, "made.o"), Path(directory, path.name)
            link = [*(word for word in words if word != "-fopenmp"), "-shared", str(made), "-o", str(linked), "-lm"]
            for native in NATIVE:
                for step in ([*words, *native, "-c", str(source), "-o", str(made)], link):
                    done = subprocess.run(step, capture_output=True, text=True)
                    if done.returncode:
                        failed = f"{shlex.join(step)} failed:\n{done.stderr.strip()[-2000:]}"
                        break
                else:
                    os.replace(linked, path)  # whole or not at all, whoever else is compiling
                    return
    except OSError as error:
        failed = f"{error}"
    raise ValueError(f"{source.name} could not be compiled; do without compiled code, or mend this: {failed}")
