"""Caches of teachers' answers that other programs wrote, imported as stores.

A new format is a module with a function that returns a `Cache`, and a row in `FORMATS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coursepack.precompute.caches.arrays import open_arrays
from coursepack.precompute.caches.fkd import open_fkd
from coursepack.precompute.caches.tinyvit import open_tinyvit

if TYPE_CHECKING:
    from collections.abc import Callable

    from coursepack.precompute.caches.base import Cache, CacheOptions

FORMATS: dict[str, Callable[[CacheOptions], Cache]] = {
    "numpy": open_arrays,
    "tinyvit": open_tinyvit,
    "fkd": open_fkd,
}
"""Function that opens a cache and checks all of it, by the name of its format."""
