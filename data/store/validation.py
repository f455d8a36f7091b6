"""Validation of manifests as untrusted input: a checksum detects damage, but not forgery.

A valid manifest references no file outside the store, and no size that is inconsistent with the file sizes.
Reading a store therefore needs no more memory than the size of its files.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from coursepack.data.store.identity import check_identity
from coursepack.data.store.layout import MOST, block_count, shard_key, table_key, whole
from coursepack.data.store.shards import shard_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from coursepack.data.store.contents import FileEntry, ViewEntry
    from coursepack.data.store.layout import ArrayLayout
    from coursepack.data.store.manifest import Manifest

TABLE_DTYPES = ("int64", "float32")
MAX_SHARDS = 1 << 16
"""Maximum number of shards of an array in a view that lists fewer files than shards."""
_SHARD = re.compile(r"c\.(0|[1-9][0-9]{0,14})\.(0|[1-9][0-9]{0,14})(\.0)*")


def listed(values: Any, kind: type) -> list[Any]:
    """Return a list from JSON after checking the type of its items.

    Raises:
        ValueError: the value is not a list of `kind`.
    """
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        raise ValueError(f"{values!r:.40} is no list of {kind.__name__}")
    return values


def mapping(values: Any) -> dict[str, Any]:
    """Return an object from JSON after checking its type.

    Raises:
        ValueError: the value is not an object.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{values!r:.40} is no object")
    return values


def check_structure(manifest: Manifest) -> None:
    """Validate the parts of a manifest that do not depend on committed views.

    Raises:
        ValueError, LookupError: the manifest is invalid; describes the defect.
    """
    if not isinstance(manifest.identity["view"]["fingerprint"], str):
        raise ValueError("the fingerprint of the view is no text")
    check_identity(manifest.identity, manifest.origin)
    _check_known(manifest)
    _check_names([*manifest.arrays, *manifest.tables])
    _check_tables(manifest)
    for name, array in manifest.arrays.items():
        wanted = {
            part: (spec.dtype, spec.row_shape)
            for part, spec in array.encoding.components(array.row_shape).items()
        }
        held = {part: (layout.dtype, layout.row_shape) for part, layout in array.components.items()}
        if held != wanted:
            raise ValueError(f"components of {name!r} are {held}, expected {wanted}")
        for layout in array.components.values():
            _check_cut(name, layout, manifest.block_rows)


def _check_known(manifest: Manifest) -> None:
    """Check the classes of a teacher that does not know all, and the shape of its logits."""
    columns = manifest.identity.get("teacher", {}).get("columns")
    if columns is None or None not in columns:
        return
    known, shape = manifest.known_classes, manifest.arrays["logits"].row_shape
    if len(columns) != len(manifest.class_names) or not known or shape != (len(known),):
        raise ValueError(
            f"logits of {shape} for a teacher that knows {len(known)} of {len(manifest.class_names)} classes"
        )


def file_entries(values: Any) -> dict[str, FileEntry]:
    """Return sizes and checksums of files from JSON, by key."""
    return {key: (whole(size), whole(crc)) for key, (size, crc) in mapping(values).items()}


def view_number(view: str, manifest: Manifest) -> int:
    """Parse the text of a view, which must be one of the planned views."""
    if not view.isdecimal() or not str(int(view)) == view or int(view) >= manifest.views:
        raise ValueError(f"{view!r:.40} is no view")
    return int(view)


def check_committed(manifest: Manifest) -> None:
    """Check that committed views are sorted and planned, and that their arrays exist."""
    for name, views in manifest.committed.items():
        if list(views) != sorted(set(views)) or (views and views[-1] >= manifest.views):
            raise ValueError(f"committed views of {name!r} are {views!r:.80}")
        if name not in manifest.arrays:
            raise KeyError(name)


def check_entry(manifest: Manifest, view: int, entry: ViewEntry) -> None:
    """Validate the files and the record of a view.

    Raises:
        ValueError, LookupError: the entry is invalid; describes the defect.
    """
    check_files(manifest, entry.files, view)
    for name, views in manifest.committed.items():
        if view in views:
            for layout in manifest.arrays[name].components.values():
                if layout.shard_count(manifest.samples) > max(MAX_SHARDS, len(entry.files)):
                    raise ValueError(f"{name!r} has more shards in view {view} than there are files")
    if entry.record is not None:
        _check_record(manifest, str(view), entry.record)
    elif view in manifest.committed.get("logits", ()):
        raise ValueError(f"view {view} is committed but has no record")


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        parts = name.split("/")
        if (
            not name.isprintable()
            or "\\" in name
            or any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts)
        ):
            raise ValueError(f"{name!r:.80} is no name of an array")


def _check_cut(name: str, layout: ArrayLayout, block_rows: int) -> None:
    if block_rows % layout.shard_rows or layout.shard_rows % layout.chunk_rows:
        raise ValueError(
            f"blocks of {block_rows} rows, shards of {layout.shard_rows} and chunks of {layout.chunk_rows} "
            f"of {name!r} do not divide each other"
        )
    if math.prod(layout.row_shape) * np.dtype(layout.dtype).itemsize * layout.shard_rows > MOST:
        raise ValueError(f"shards of {name!r} are too large")


def _check_tables(manifest: Manifest) -> None:
    labels = manifest.tables["labels"]
    if (labels.layout.dtype, labels.shape) != ("int64", (manifest.samples,)):
        raise ValueError(f"labels are {labels.layout.dtype} {labels.shape}, expected one per sample")
    for name, table in manifest.tables.items():
        if table.layout.dtype not in TABLE_DTYPES or not 0 < table.rows <= table.layout.shard_rows:
            raise ValueError(f"table {name!r} is not one shard of {TABLE_DTYPES}")
        _check_cut(name, table.layout, table.layout.shard_rows)


def check_files(manifest: Manifest, files: Mapping[str, FileEntry], view: int | None) -> None:
    """Check that files are shards of a view, or of tables if `view` is None, and have the expected sizes."""
    tables = {table_key(name, table.layout): table for name, table in manifest.tables.items()}
    layouts: Mapping[str, ArrayLayout] = {
        f"{name}/{part}": layout
        for name, array in manifest.arrays.items()
        for part, layout in array.components.items()
    }
    for key, (size, crc) in files.items():
        if view is None and key in tables:
            layout, rows = tables[key].layout, tables[key].rows
        else:
            array, _, file = key.rpartition("/")
            match = _SHARD.fullmatch(file)
            if view is None or match is None or array not in layouts:
                raise ValueError(f"{key!r:.80} is no file of a store")
            shard = int(match[2])
            layout = layouts[array]
            rows = min(layout.shard_rows, manifest.samples - shard * layout.shard_rows)
            if key != shard_key(array, view, shard, layout) or view >= manifest.views or rows <= 0:
                raise ValueError(f"{key!r:.80} is no shard of {array!r}")
        if size != shard_size(rows, layout) or crc >= 1 << 32:
            raise ValueError(f"{key!r:.80} cannot have {size} bytes and the checksum {crc}")


def _check_record(manifest: Manifest, view: str, record: Mapping[str, Any]) -> None:
    blocks = block_count(manifest.samples, manifest.block_rows)
    _check_numbers(view, mapping(record["sums"]))
    for entry in mapping(record["fidelity"]).values():
        _check_numbers(view, {name: entry[name] for name in ("rows", "sum", "largest")})
        _check_numbers(view, {int(place): count for place, count in entry["histogram"].items()})
    for environment in listed(record["environments"], dict):
        whole(environment.get("batch_size", 1), 1)
    if len(listed(record["draws"], str)) != blocks:
        raise ValueError(f"view {view} has {len(record['draws'])} checksums of draws, expected {blocks}")
    # Older stores have no checksums of content.
    if len(listed(record.get("content", []), str)) not in (0, blocks):
        raise ValueError(f"view {view} has {len(record['content'])} checksums of content, not {blocks}")
    precision = mapping(record.get("precision", {"rows": 1, "kl": 0.0}))
    _check_numbers(view, {name: precision[name] for name in ("rows", "kl")})
    for sample, digest in mapping(record.get("probes", {})).items():
        if not (sample.isdecimal() and int(sample) < manifest.samples and isinstance(digest, str)):
            raise ValueError(f"{sample!r:.40} is no sample with a checksum")


def _check_numbers(view: str, numbers: Mapping[Any, Any]) -> None:
    for name, value in numbers.items():
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{value!r:.40} is no number for {name!r:.40} of view {view}")
    if numbers.get("rows", 1) < 1:
        raise ValueError(f"view {view} has {numbers['rows']!r} rows")
