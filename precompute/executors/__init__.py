"""Executors, which compute the blocks of a store in this process or in others.

base    the interface: takes groups of blocks and yields each finished group
local   executor that runs in this process
ray     executor that hands out blocks to the workers of a Ray cluster
actors  workers of a Ray cluster: starting and comparing them
worker  a worker's own process
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coursepack.precompute.executors.local import LocalExecutor as LocalExecutor
from coursepack.precompute.executors.ray import RayExecutor as RayExecutor

if TYPE_CHECKING:
    from collections.abc import Callable

    from coursepack.precompute.executors.base import Executor

EXECUTORS: dict[str, Callable[..., Executor]] = {
    "local": LocalExecutor,
    "ray": RayExecutor,
}
"""Executors by name. Their arguments have defaults and are options of `precompute run`."""
