"""Who computes the blocks of a store: this process, or others.

base    the interface: takes groups of blocks, gives back those that are done
local   this process
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coursepack.precompute.executors.local import LocalExecutor as LocalExecutor

if TYPE_CHECKING:
    from collections.abc import Callable

    from coursepack.precompute.executors.base import Executor

EXECUTORS: dict[str, Callable[[], Executor]] = {"local": LocalExecutor}
"""Executors by their names."""
