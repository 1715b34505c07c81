"""Memory of the CPU: what one training step gives back, the next takes again."""

from __future__ import annotations

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3), as in malloc.h
_NEVER = 2**30  # bytes


def keep_freed_memory() -> None:
    """Have the C library keep what is freed, for this process and from now on.

    glibc returns large blocks to the system, and every page of a new one costs a fault: of a training step a twentieth,
    and a quarter where many experts have gradients in bfloat16. A step's blocks are those of the step before, so that
    keeping them takes hardly more memory. Another C library, or settings of the user's own (``MALLOC_...``), are left
    as they are.
    """
    if platform.libc_ver()[0] == "glibc" and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt = ctypes.CDLL(None).mallopt
        for threshold in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            mallopt(threshold, _NEVER)
