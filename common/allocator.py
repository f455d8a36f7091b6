"""Setting of the C library's allocator that training and forward passes on a CPU need."""

from __future__ import annotations

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8
"""Numbers of mallopt's parameters in glibc's malloc.h."""
KEPT_BYTES = 2**31 - 1
# Further arenas have parts of 64 MiB, return larger blocks all the same, and each serves a few threads only.
SETTINGS = {TRIM_THRESHOLD: KEPT_BYTES, MMAP_THRESHOLD: KEPT_BYTES, ARENA_MAX: 1}
VARIABLES = (
    "MALLOC_ARENA_MAX",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_MMAP_MAX_",
    "MALLOC_TOP_PAD_",
)


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for later allocations instead of returning it to the system.

    By default glibc returns large blocks when they are freed. Activations of a step are such blocks, and the
    system clears every page of them again for the next step. All threads share the kept memory. The setting
    holds until the process ends; the peak of its memory stays the same. Environment variables of glibc's
    allocator take precedence.

    Returns:
        True if the setting was made; False with other C libraries, or where the environment has settings.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or "glibc.malloc" in tunables or any(name in os.environ for name in VARIABLES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(parameter, value) == 1 for parameter, value in SETTINGS.items())
