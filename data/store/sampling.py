"""Comparison of one random chunk per array, as read by the `zarr` library, with the bytes in its shard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from coursepack.data.store.layout import shard_key, table_key
from coursepack.data.store.shards import chunk_offsets
from coursepack.data.store.zarr_metadata import METADATA, read_rows
from coursepack.errors import StoreDamaged

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from coursepack.data.store.layout import ArrayLayout
    from coursepack.data.store.locations.base import Location
    from coursepack.data.store.manifest import Manifest


def unlike_zarr(location: Location, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Yield the metadata key and a description of every array that `zarr` reads differently.

    Args:
        location: location of a store whose files match its manifest.
        manifest: manifest of the store.
    """
    rng = np.random.default_rng()
    for array, (layout, shape) in manifest.zarr_arrays().items():
        view = None
        if array not in manifest.tables:
            committed = manifest.committed.get(array.rpartition("/")[0], ())
            if not committed:
                continue
            view = int(rng.choice(committed))
        rows = shape[0] if view is None else shape[1]
        start = int(rng.integers(rows)) // layout.chunk_rows * layout.chunk_rows
        stop = min(start + layout.chunk_rows, rows)
        try:
            expected = _stored_rows(location, array, view, start, rows, layout)[: stop - start]
        except StoreDamaged as error:
            yield f"{array}/{METADATA}", str(error)
            continue
        try:
            found = read_rows(location, array, view, start, stop)
        except Exception as error:  # other readers of the store would fail likewise
            yield f"{array}/{METADATA}", f"zarr cannot read the array: {type(error).__name__}: {error}"
            continue
        if found.dtype != expected.dtype or found.tobytes() != expected.tobytes():
            what = "a table" if view is None else f"view {view}"
            yield f"{array}/{METADATA}", f"zarr reads other values in rows {start} to {stop - 1} of {what}"


def _stored_rows(
    location: Location, array: str, view: int | None, start: int, rows: int, layout: ArrayLayout
) -> NDArray[Any]:
    """Return all rows of the chunk that starts at row `start`, read from its shard."""
    shard = start // layout.shard_rows
    key = table_key(array, layout) if view is None else shard_key(array, view, shard, layout)
    file = location.map(key).content
    held = min(layout.shard_rows, rows - shard * layout.shard_rows)
    first = start - shard * layout.shard_rows
    offset = int(chunk_offsets(file, held, layout, key)[first // layout.chunk_rows])
    chunk = file[offset : offset + layout.chunk_rows * layout.row_bytes]
    return np.ascontiguousarray(chunk).view(layout.dtype).reshape(-1, *layout.row_shape)
