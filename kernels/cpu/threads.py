"""Threads of the compiled kernels: their number, and the call that runs a kernel in them.

Kernels run in torch's own OpenMP threads, through `GOMP_parallel` of the library that torch uses. A second
pool would compete with the first for the same cores, and torch's threads are already awake.
`torch.set_num_threads` therefore applies to kernels too. If torch uses another threading library (macOS,
Windows), kernels are serial.

OpenMP threads do not survive a fork, and a parallel region in a forked child would wait for them forever, so
kernels are serial in a forked child. They are also serial in every Python thread except the main one.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

PAUSE_SOFT = 1
"""Kind of pause in OpenMP's omp.h that keeps settings, such as the number of threads."""
_IMPORTED_IN = os.getpid()


def usable_threads(work: int, least: int) -> tuple[int, str]:
    """Return the number of threads to use for an amount of work, and the reason.

    Args:
        work: amount of work in any unit.
        least: smallest amount, in the same unit, for which more than one thread is faster.
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
    """Return `GOMP_parallel(function, data, threads, flags)` of torch's OpenMP, or None if torch has none."""
    region: Any = _of_torch("GOMP_parallel")
    if region is not None:
        region.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint]
        region.restype = None
    return region  # type: ignore[no-any-return]  # ctypes has no types of functions


def use_threads(count: int) -> None:
    """Set the number of threads in which torch runs operations of the calling thread.

    `torch.set_num_threads` also sets the number for all threads that have not computed yet, and a thread
    that calls it before its first operation may get that of another.
    """
    torch.get_num_threads()  # the first call in a thread sets its number
    set_threads, set_of_mkl = map(_of_torch, ("omp_set_num_threads", "MKL_Set_Num_Threads_Local"))
    (set_threads or torch.set_num_threads)(count)
    if set_of_mkl is not None:
        set_of_mkl(count)


def end_idle_threads() -> None:
    """End the OpenMP threads that the calling thread keeps; its next parallel operation starts new ones."""
    pause = _of_torch("omp_pause_resource_all")
    if pause is not None:
        pause(PAUSE_SOFT)


def _of_torch(name: str) -> Any:
    """Return a function of a library that torch is linked with, or None if it is not."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # Looked up through the library that uses it, to get the same copy.
        return getattr(ctypes.CDLL(str(library)), name)
    except (OSError, AttributeError):
        return None


def run_kernel(kernel: int, data: bytes, threads: int) -> None:
    """Run the compiled `void kernel(void *data)` at an address once in every thread and wait for all."""
    region = parallel_region() if threads > 1 else None
    if region is None:
        _function(kernel)(data)
    else:
        region(kernel, data, threads, 0)


@functools.cache
def _function(kernel: int) -> Callable[[bytes], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_char_p)(kernel)
