"""numba decorators and types for the compiled kernels. Imported at first use: numba is slow to import.

The names are typed `Any`, because a decorated function is no longer a Python function.
"""

from __future__ import annotations

import functools
import zlib
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba.extending import intrinsic as numba_intrinsic

# No wrappers for calls from Python and C: most of these functions only call each other, and the wrappers
# would be half of the code to compile.
#
# A function is optimized and compiled again with every caller, up to the entry point. Tiny functions are
# therefore inlined by LLVM (`forceinline`), and some with a single caller by numba (`inline="always"`), which
# copies their code including callees that were inlined. `min` and `max` are functions as well.
njit: Any = functools.partial(numba.njit, no_cpython_wrapper=True, no_cfunc_wrapper=True)
carray: Any = getattr(numba, "carray")  # noqa: B009 - mypy does not see it
intrinsic: Any = numba_intrinsic
types: Any = numba.types
float32: Any = np.float32
float64: Any = np.float64
int64: Any = np.int64

SOURCES = zlib.crc32(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))) | 1
"""Checksum of all source files in this folder. numba decides from one file whether cached code is stale and
ignores the files of called functions, so entry points hold this number as a closure variable."""


def compiled(signature: Any) -> Any:
    """Compile to a C function and cache it on disk if possible."""
    return lambda function: _cached(functools.partial(numba.cfunc, signature), function)


def jit(function: Any) -> Any:
    """Compile, at its first call, a function that Python calls, without holding the interpreter."""
    return _cached(functools.partial(numba.njit, nogil=True), function)


def _cached(decorator: Any, function: Any) -> Any:
    """Decorate with a cache on disk, or without one where numba refuses it.

    It does if neither the source folder nor the user's cache folder is writable. The function is then
    compiled again in every process.
    """
    try:
        return decorator(cache=True)(function)
    except RuntimeError as err:
        if "no locator available" not in str(err):
            raise
        return decorator()(function)
