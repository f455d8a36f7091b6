"""Choice of how stores are read, from the size of a view and the free memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from coursepack.data.store.manifest import LOGITS

try:
    import resource
except ImportError:
    resource = None  # type: ignore[assignment]  # a module that Windows does not have

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coursepack.data.store import StoreReader
    from coursepack.data.store.reader import Reading


def choose_reading(
    readers: Sequence[StoreReader], free_bytes: int, arrays: Sequence[Sequence[str]] | None = None
) -> Reading:
    """Choose how stores are read, from the size of a view and the free memory.

    `resident` if two views of every store fit into half of the free memory; `mapped`, served by the page
    cache, if one view of every store fits into four fifths of it; otherwise `windowed`.

    Args:
        readers: the stores.
        free_bytes: free memory.
        arrays: names of the arrays to read from each store; None means the logits.
    """
    arrays = [[LOGITS] for _ in readers] if arrays is None else arrays
    view_bytes = sum(reader.view_bytes(names) for reader, names in zip(readers, arrays, strict=True))
    if 2 * view_bytes <= free_bytes // 2:
        return "resident"
    return "mapped" if view_bytes <= free_bytes * 4 // 5 else "windowed"


def free_memory() -> int:
    """Return the bytes available without swapping, within the limits of the control group and the process."""
    free: int = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    if resource is not None:
        held = psutil.Process().memory_info()
        # psutil reports no data segment on macOS.
        for kind, bytes_held in (
            (resource.RLIMIT_DATA, getattr(held, "data", held.rss)),
            (resource.RLIMIT_AS, held.vms),
        ):
            most = resource.getrlimit(kind)[0]
            if most != resource.RLIM_INFINITY:
                free = min(free, most - bytes_held)
    return max(0, free)
