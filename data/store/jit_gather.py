"""Copying rows from memory-mapped chunks, compiled. Loaded at first use: importing numba is slow.

The functions take raw addresses and check nothing: `reader` checks every index and every file first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

if TYPE_CHECKING:
    import numpy as np


@intrinsic
def _copy_bytes(typingctx: Any, target: Any, origin: Any, count: Any) -> Any:  # noqa: ARG001 - numba's protocol
    """memcpy between two addresses."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001 - numba's protocol
        byte = context.get_value_type(types.voidptr)
        target, origin = (builder.inttoptr(address, byte) for address in args[:2])
        cgutils.raw_memcpy(builder, target, origin, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@njit(cache=True, nogil=True)
def gather_rows(
    chunks: np.ndarray, chunk_rows: int, row_bytes: int, samples: np.ndarray, target: int
) -> None:
    """Copy row `samples[i]` to `target + i * row_bytes`, where chunk j starts at address `chunks[j]`."""
    for i in range(len(samples)):
        chunk, row = divmod(samples[i], chunk_rows)
        _copy_bytes(target + i * row_bytes, chunks[chunk] + row * row_bytes, row_bytes)
