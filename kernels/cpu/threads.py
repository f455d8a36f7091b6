"""How many threads a compiled kernel may use here, and how it gets them.

It borrows torch's own: OpenMP's `GOMP_parallel` in the very library that torch computes with. A second pool
would spin against the first for the same cores, and torch's threads are awake already. So
`torch.set_num_threads` holds for kernels too. Where torch has another threading library (macOS, Windows) a
kernel is serial.

OpenMP's threads do not survive a fork, and a parallel region in the child would wait for them for ever; so a
forked child is serial. So are all threads of Python but the main one: they are workers themselves.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

_IMPORTED_IN = os.getpid()


def usable_threads(work: int, least: int) -> tuple[int, str]:
    """How many threads to use for an amount of work, and why.

    Args:
        work: any measure of it.
        least: below this, waking other threads costs more than they save.
    """
    count = torch.get_num_threads()
    if count == 1:
        return 1, "torch.get_num_threads() is 1"
    if work < least:
        return 1, f"too little work for two threads ({work} < {least})"
    if os.getpid() != _IMPORTED_IN:
        return 1, "forked child"
    if threading.current_thread() is not threading.main_thread():
        return 1, "not the main thread"
    if parallel_region() is None:
        return 1, "torch has no OpenMP that can be borrowed"
    return count, f"torch's {count} OpenMP threads"


@functools.cache
def parallel_region() -> Callable[..., None] | None:
    """`GOMP_parallel(function, data, threads, flags)` of torch's OpenMP; None where there is none."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # Looked up through the library that uses it, so that it is the same copy.
        region = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    region.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint]
    region.restype = None
    return region


def run_kernel(kernel: int, data: bytes, threads: int) -> None:
    """Call the compiled `void kernel(void *data)` at an address once in every thread; waits for all."""
    region = parallel_region() if threads > 1 else None
    if region is None:
        _function(kernel)(data)
    else:
        region(kernel, data, threads, 0)


@functools.cache
def _function(kernel: int) -> Callable[[bytes], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_char_p)(kernel)
