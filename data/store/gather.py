"""Copying of samples' rows from memory-mapped chunks into one buffer, in torch's threads."""

from __future__ import annotations

import ctypes
import functools
import importlib
import struct
from typing import TYPE_CHECKING, Any

from coursepack.kernels.cpu.threads import run_kernel, usable_threads

if TYPE_CHECKING:
    from types import ModuleType

    import numpy as np
    from numpy.typing import NDArray

ALIGNMENT = 64
"""Alignment in bytes of the first row of every component."""
PARALLEL_FROM = 1 << 18
"""Number of bytes above which more than one thread is faster."""
PIECES = 4
"""Pieces of a component for each thread, so that threads end together."""
_State = ctypes.c_int64 * 2


def copy_rows(table: NDArray[np.int64], rows: int, samples: NDArray[np.int64], out: NDArray[Any]) -> int:
    """Copy the rows of samples `(n,)`, one component after another.

    Args:
        table: `(components, 3)`: the address of an int64 array with the address of the first row of every
            chunk, the rows of a chunk, and the bytes of a row.
        rows: number of rows N; valid samples are 0 to N - 1.
        samples: contiguous indices of samples.
        out: uint8 memory for all rows; each component starts at a multiple of `ALIGNMENT`.

    Returns:
        -1, or the index of the first sample out of range, in which case nothing is copied.
    """
    threads, _ = usable_threads(out.nbytes, PARALLEL_FROM)
    if threads == 1:
        return int(_compiled().copy_serially(table, rows, samples, out))
    count, state = len(samples), _State()
    sizes = len(table), rows, count, max(1, -(-count // (PIECES * threads)))
    places = samples.ctypes.data, out.ctypes.data, ctypes.addressof(state)
    data = struct.pack("8q", table.ctypes.data, *sizes, *places)
    run_kernel(_compiled().compiled_pieces(), data, threads)
    return state[1] - 1


@functools.cache
def _compiled() -> ModuleType:
    """Return the module of the compiled functions, imported at first use: numba is slow to import."""
    return importlib.import_module("coursepack.data.store.jit_gather")
