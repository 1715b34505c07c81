"""``decode.c``, compiled."""

from __future__ import annotations

import ctypes
from pathlib import Path

from open_mythos.native import library

SOURCE = Path(__file__).with_name("decode.c")


def compiled() -> ctypes.CDLL:
    """The code that :mod:`open_mythos.generation.native.decoder` calls.

    Raises:
        ValueError: if it cannot be had; see :func:`open_mythos.native.library`.
    """
    try:
        code = library(SOURCE)
    except ValueError as error:
        raise ValueError(f"compile=True cannot be had, leave compile out: {error}") from error
    code.mythos_open.restype = ctypes.c_void_p
    return code
