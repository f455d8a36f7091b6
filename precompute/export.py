"""Export of a store: decoded rows in float32, with their labels, in one safetensors file.

The file is written piece by piece, so that a store of any size takes little memory; safetensors' own function
takes all tensors at once.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from coursepack.canonical import canonical_json
from coursepack.console import progress
from coursepack.data.store.identity import check_complete
from coursepack.data.store.manifest import LABELS
from coursepack.errors import RecipeError
from coursepack.files import write_pieces

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from coursepack.console import Meter
    from coursepack.data.store import StoreReader

ROWS_AT_A_TIME = 4096
"""Number of rows that are decoded together."""
VIEWS = "views"
"""Tensor with the indices of the exported views."""
_ALIGNMENT = 8
_DTYPES = {"float32": "F32", "int64": "I64"}


@dataclass(frozen=True)
class Exported:
    """Content of an exported file."""

    shapes: dict[str, tuple[int, ...]]
    """Shape of each tensor by name: `labels (N,)`, `views (V,)`, and the store's arrays `(V, N, ...)`."""
    size: int
    """Size of the file in bytes."""


def export_safetensors(reader: StoreReader, path: Path, views: int | None = None) -> Exported:
    """Write the decoded rows of a store's committed views to a file.

    Args:
        reader: the store.
        path: file to write; replaced if it exists.
        views: number of views, from the first. Defaults to all.

    Raises:
        RecipeError: the file's suffix is not `.safetensors`, or the store has fewer views.
        StoreIncomplete: no view has all arrays.
        StoreDamaged: a file does not match its checksum.
    """
    if path.suffix != ".safetensors":
        raise RecipeError(f"--out {str(path)!r} ends in {path.suffix!r}, expected .safetensors")
    check_complete(reader.manifest, reader.address)
    committed = reader.manifest.committed_views()
    if not committed or (views is not None and views > len(committed)):
        raise RecipeError(
            f"store {reader.address!r} has {len(committed)} views with all of its arrays, expected at least "
            f"{views or 1}: give fewer --views, or finish the store with `precompute run`"
        )
    chosen, samples = committed[:views], reader.manifest.samples
    tables = {LABELS: reader.labels(), VIEWS: np.array(chosen, np.int64)}
    shapes = {name: value.shape for name, value in tables.items()}
    dtypes = dict.fromkeys(tables, "int64")
    for name, array in reader.manifest.arrays.items():
        shapes[name], dtypes[name] = (len(chosen), samples, *array.row_shape), "float32"
    header = _header(shapes, dtypes, _metadata(reader))
    rows = samples * len(chosen) * len(reader.manifest.arrays)
    with progress(f"export {reader.name}", rows, "rows") as meter:
        tensors = (value.astype("<i8").tobytes() for value in tables.values())
        size = write_pieces(path, _pieces(header, tensors, _rows(reader, chosen, meter)))
    return Exported(shapes, size)


def _pieces(header: bytes, tables: Iterator[bytes], rows: Iterator[bytes]) -> Iterator[bytes]:
    yield header
    yield from tables
    yield from rows


def _rows(reader: StoreReader, views: Sequence[int], meter: Meter) -> Iterator[bytes]:
    """Yield the decoded rows of one array after the other."""
    samples = reader.manifest.samples
    for name in reader.manifest.arrays:
        for view in views:
            for start in range(0, samples, ROWS_AT_A_TIME):
                chosen = np.arange(start, min(start + ROWS_AT_A_TIME, samples))
                yield reader.rows(name, view, chosen).decode().numpy().astype("<f4", copy=False).tobytes()
                meter.advance(len(chosen), name)


def _header(shapes: dict[str, tuple[int, ...]], dtypes: dict[str, str], metadata: dict[str, str]) -> bytes:
    """Return the header of a safetensors file: its length, then JSON padded with spaces."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * np.dtype(dtypes[name]).itemsize
        entries[name] = {"dtype": _DTYPES[dtypes[name]], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _metadata(reader: StoreReader) -> dict[str, str]:
    """Return what the rows are, as texts; values that are no texts are canonical JSON."""
    manifest = reader.manifest
    identity = manifest.identity
    encodings = {name: array.encoding.name for name, array in manifest.arrays.items()}
    return {
        "format": "coursepack export",
        "store_fingerprint": manifest.fingerprint,
        "view_fingerprint": manifest.view_fingerprint,
        "source_fingerprint": identity["source"]["fingerprint"],
        "source": identity["source"]["name"],
        "view": canonical_json(identity["view"]["recipe"]),
        "teacher": canonical_json(identity["teacher"]),
        "class_names": canonical_json(list(manifest.class_names)),
        "encodings": canonical_json(encodings),
        "temperature": "1",
    }
