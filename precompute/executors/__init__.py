"""Executors, which compute the blocks of a store in this process or in others.

base    the interface: takes groups of blocks and yields each finished group
local   executor that runs in this process
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coursepack.precompute.executors.local import LocalExecutor as LocalExecutor

if TYPE_CHECKING:
    from collections.abc import Callable

    from coursepack.precompute.executors.base import Executor

EXECUTORS: dict[str, Callable[[], Executor]] = {"local": LocalExecutor}
"""Executors by name."""
