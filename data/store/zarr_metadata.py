"""Zarr v3 metadata of a store's arrays and groups, and reading of rows with the `zarr` library.

Rows are written and read without `zarr` (see `shards`). The library generates the contents of `zarr.json`,
and `verify` uses it to read one chunk of every array, to test compatibility with other Zarr readers.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from coursepack.data.store.layout import ArrayLayout
    from coursepack.data.store.locations.base import Location
    from coursepack.data.store.manifest import Manifest

METADATA = "zarr.json"
OPTIONAL = ("storage_transformers", "consolidated_metadata")
"""Members that some versions of the library write even if empty, and other versions omit."""


def array_metadata(layout: ArrayLayout, shape: tuple[int, ...]) -> dict[str, Any]:
    """Return the Zarr v3 metadata of an array: sharded, with chunks `[bytes, crc32c]` and no compression.

    Args:
        layout: layout of the array.
        shape: `(V, N, *row_shape)`, or `(N,)` for an array without views.
    """
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec

    lead = (1,) * (len(shape) - 1 - len(layout.row_shape))
    return _made(
        lambda store: zarr.create_array(
            store,
            shape=shape,
            shards=(*lead, layout.shard_rows, *layout.row_shape),
            chunks=(*lead, layout.chunk_rows, *layout.row_shape),
            dtype=layout.dtype,
            fill_value=np.nan if np.dtype(layout.dtype).kind == "f" else 0,
            filters=None,
            serializer=BytesCodec(),
            compressors=(Crc32cCodec(),),
            chunk_key_encoding={"name": "default", "separator": "."},
            zarr_format=3,
        )
    )


def group_metadata(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Zarr v3 metadata of a group."""
    import zarr

    return _made(lambda store: zarr.create_group(store, attributes=dict(attributes), zarr_format=3))


def zarr_metadata(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Return every zarr.json of a store by key, arrays first and the root group last."""
    metadata = {
        f"{path}/{METADATA}": array_metadata(layout, shape)
        for path, (layout, shape) in manifest.zarr_arrays().items()
    }
    return metadata | {
        _metadata_key(group): group_metadata(group_attributes(group, manifest.format_version))
        for group in _zarr_groups(manifest)
    }


def zarr_keys(manifest: Manifest) -> list[str]:
    """Return the keys of `zarr_metadata` without generating the metadata."""
    arrays = [f"{path}/{METADATA}" for path in manifest.zarr_arrays()]
    return arrays + [_metadata_key(group) for group in _zarr_groups(manifest)]


def _zarr_groups(manifest: Manifest) -> list[str]:
    """Return the paths of the groups, inner ones first; the path of the root group is empty."""
    groups = {""}
    for path in manifest.zarr_arrays():
        parents = path.split("/")[:-1]
        groups |= {"/".join(parents[: depth + 1]) for depth in range(len(parents))}
    return sorted(groups, reverse=True)


def _metadata_key(group: str) -> str:
    return f"{group}/{METADATA}" if group else METADATA


def group_attributes(group: str, version: int) -> dict[str, Any]:
    """Return the attributes of a group: the format version for the root group (empty path), else none."""
    return {} if group else {"coursepack": {"format_version": version}}


def read_rows(location: Location, array: str, view: int | None, start: int, stop: int) -> NDArray[Any]:
    """Read rows `start` to `stop` of an array, or of one view of it, with `zarr`.

    Raises:
        Exception: any error raised by `zarr`.
    """
    import zarr

    opened = zarr.open_array(location.zarr_store(), path=array, mode="r", zarr_format=3)
    selection = slice(start, stop) if view is None else (view, slice(start, stop))
    return np.asarray(opened[selection])


def _made(make: Any) -> dict[str, Any]:
    """Return the metadata that `zarr` writes when it creates a node in memory."""
    from zarr.storage import MemoryStore

    written: dict[str, Any] = {}
    make(MemoryStore(store_dict=written))
    metadata: dict[str, Any] = json.loads(written[METADATA].to_bytes())
    return {name: value for name, value in metadata.items() if value or name not in OPTIONAL}
