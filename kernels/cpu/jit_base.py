"""numba as the compiled kernels use it. Loaded at first use: importing numba is slow.

Its names are untyped here, as what they decorate is no longer a Python function.
"""

from __future__ import annotations

import functools
import zlib
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba.extending import intrinsic as numba_intrinsic

# No wrappers to be called from Python and C by: most of these functions are called by each other only, and
# the wrappers would be half of what there is to compile.
#
# A function is optimised and compiled again with each that calls it, up to the entry point. So tiny ones are
# inlined by LLVM (`forceinline`), and some that have one caller already by numba (`inline="always"`), which
# copies all that is in them, callees that were inlined too. `min` and `max` are functions as well.
njit: Any = functools.partial(numba.njit, no_cpython_wrapper=True, no_cfunc_wrapper=True)
carray: Any = getattr(numba, "carray")  # noqa: B009 - mypy does not see it
intrinsic: Any = numba_intrinsic
types: Any = numba.types
float32: Any = np.float32
float64: Any = np.float64
int64: Any = np.int64

SOURCES = zlib.crc32(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))) | 1
"""What all sources here say. numba itself looks at one file only to see whether compiled code is stale, not
at the files of the functions that are called: an entry point takes this number as a closure variable."""


def compiled(signature: Any) -> Any:
    """A C function that is kept on disk where there is a place for it.

    numba refuses to compile at all where neither the sources' folder nor the user's cache can be written;
    then it is compiled anew in every process.
    """

    def wrap(function: Any) -> Any:
        try:
            return numba.cfunc(signature, cache=True)(function)
        except RuntimeError as err:
            if "no locator available" not in str(err):
                raise
            return numba.cfunc(signature)(function)

    return wrap
