"""The Zarr v3 metadata of a store's arrays and groups, made by the `zarr` library, and reading through it.

Rows are written and read without `zarr` (see `shards`); it says what is written in `zarr.json`, and `verify`
reads a little of every array through it, as any other reader of Zarr would.
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
"""Members that some versions of the library write where they say nothing, and others leave out."""


def array_metadata(layout: ArrayLayout, shape: tuple[int, ...]) -> dict[str, Any]:
    """Zarr v3 metadata of an array: sharded, chunks `[bytes, crc32c]`, never compressed.

    Args:
        layout: how rows are cut.
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
    """Zarr v3 metadata of a group."""
    import zarr

    return _made(lambda store: zarr.create_group(store, attributes=dict(attributes), zarr_format=3))


def zarr_metadata(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Every zarr.json of a store by its key, arrays first and the group's own last."""
    metadata = {
        f"{path}/{METADATA}": array_metadata(layout, shape)
        for path, (layout, shape) in manifest.zarr_arrays().items()
    }
    return metadata | {
        _metadata_key(group): group_metadata(group_attributes(group, manifest.format_version))
        for group in _zarr_groups(manifest)
    }


def zarr_keys(manifest: Manifest) -> list[str]:
    """Keys of `zarr_metadata`."""
    arrays = [f"{path}/{METADATA}" for path in manifest.zarr_arrays()]
    return arrays + [_metadata_key(group) for group in _zarr_groups(manifest)]


def _zarr_groups(manifest: Manifest) -> list[str]:
    """Paths of the groups, inner ones first; the store's own is empty."""
    groups = {""}
    for path in manifest.zarr_arrays():
        parents = path.split("/")[:-1]
        groups |= {"/".join(parents[: depth + 1]) for depth in range(len(parents))}
    return sorted(groups, reverse=True)


def _metadata_key(group: str) -> str:
    return f"{group}/{METADATA}" if group else METADATA


def group_attributes(group: str, version: int) -> dict[str, Any]:
    """Attributes of a group by its path; the store's own, of an empty path, says the format version."""
    return {} if group else {"coursepack": {"format_version": version}}


def read_rows(location: Location, array: str, view: int | None, start: int, stop: int) -> NDArray[Any]:
    """Rows `start` to `stop` of an array, or of one view of it, as `zarr` reads them.

    Raises:
        Exception: whatever `zarr` raises where it cannot read them.
    """
    import zarr

    opened = zarr.open_array(location.zarr_store(), path=array, mode="r", zarr_format=3)
    selection = slice(start, stop) if view is None else (view, slice(start, stop))
    return np.asarray(opened[selection])


def _made(make: Any) -> dict[str, Any]:
    """What `zarr` writes when it makes a node in memory."""
    from zarr.storage import MemoryStore

    written: dict[str, Any] = {}
    make(MemoryStore(store_dict=written))
    metadata: dict[str, Any] = json.loads(written[METADATA].to_bytes())
    return {name: value for name, value in metadata.items() if value or name not in OPTIONAL}
