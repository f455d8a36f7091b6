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
    """How to read stores together, from the size of a view and the memory that is free.

    `arrays` says what is read of each; None means the logits.

    Two views of every store in half of the memory: `resident`. One in four fifths of it: `mapped`, which the
    page cache serves. More than that: `windowed`.
    """
    arrays = [[LOGITS] for _ in readers] if arrays is None else arrays
    view_bytes = sum(reader.view_bytes(names) for reader, names in zip(readers, arrays, strict=True))
    if 2 * view_bytes <= free_bytes // 2:
        return "resident"
    return "mapped" if view_bytes <= free_bytes * 4 // 5 else "windowed"


def free_memory() -> int:
    """Bytes of memory that could be used without swapping, within the limits of control group and process."""
    free: int = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    if resource is not None:
        held = psutil.Process().memory_info()
        # macOS counts no data segment apart.
        for kind, bytes_held in (
            (resource.RLIMIT_DATA, getattr(held, "data", held.rss)),
            (resource.RLIMIT_AS, held.vms),
        ):
            most = resource.getrlimit(kind)[0]
            if most != resource.RLIM_INFINITY:
                free = min(free, most - bytes_held)
    return max(0, free)
