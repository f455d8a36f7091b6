"""Compiled functions made ready in a thread, while a run opens its files and renders its first batches."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
from typing import TYPE_CHECKING

from coursepack.kernels import dispatch

if TYPE_CHECKING:
    from collections.abc import Iterable

LOSS = ("jit_loss", "jit_mixture", "jit_stats")
"""Modules of the fused loss and of the mixture and statistics of teachers."""
DIVERGENCES = ("jit_divergences", "jit_mixture", "jit_stats")
"""Modules of the same with divergences other than KL."""
ANGLES, HINTS = ("jit_angles",), ("jit_regression",)
"""Modules of the angle loss, and of hints."""
PACKAGE = "coursepack.kernels.cpu"
"""Package of the modules."""
_threads: list[threading.Thread] = []


def preload(modules: Iterable[str]) -> threading.Thread | None:
    """Start to compile the functions of some modules, or to load them from numba's cache on disk.

    The first use of a function waits until it is ready. An error is not lost: the first use imports its
    module again, and raises it.

    Args:
        modules: names of modules of `coursepack.kernels.cpu` that compile when they are imported.

    Returns:
        The thread, or None if there is nothing to do.
    """
    names = [f"{PACKAGE}.{name}" for name in dict.fromkeys(modules)]
    missing = [name for name in names if name not in sys.modules]
    if not missing or not dispatch.NUMBA_IS_INSTALLED:
        return None
    # Not a daemon, which the interpreter would stop in the middle of LLVM when it exits.
    thread = threading.Thread(target=_import, args=(missing,), name="coursepack-compile")
    _threads.append(thread)
    thread.start()
    return thread


def _import(names: Iterable[str]) -> None:
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def _finish() -> None:
    """Wait for all threads, since locks that they hold would stay locked in a forked child."""
    while _threads:
        _threads.pop().join()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_finish)
