"""Cache folder for what was computed from a data set's files, so that the next start is fast.

Its content can be deleted at any time. If the folder cannot be written, every start repeats the work; a
damaged file is treated as missing.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np

from coursepack.files import write_whole

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

VARIABLE = "COURSEPACK_CACHE"


def cache_folder() -> Path:
    """Return `$COURSEPACK_CACHE`, else `coursepack` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if given := os.environ.get(VARIABLE):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "coursepack"


def key_of(*parts: str) -> str:
    """Return a short hash of the texts, for use in file names."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def load_arrays(key: str) -> dict[str, NDArray[Any]] | None:
    """Return the arrays cached under a key, or None if there are no readable ones."""
    try:
        # Read into memory first, because numpy leaves a damaged file open.
        content = io.BytesIO((cache_folder() / f"{key}.npz").read_bytes())
        with np.load(content, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None


def save_arrays(key: str, arrays: dict[str, NDArray[Any]]) -> None:
    """Cache arrays under a key, replacing earlier ones; do nothing if the folder cannot be written."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    _save(f"{key}.npz", buffer.getbuffer())


def load_mapped(
    tree_key: str, content_key: str, shape: tuple[int, ...], dtype: DTypeLike = np.uint8
) -> NDArray[Any] | None:
    """Return the cached array of a tree, memory-mapped read-only, or None if missing or damaged.

    Args:
        tree_key: key of the tree of files; at most one array is cached for it.
        content_key: key of the tree's current content.
        shape: expected shape.
        dtype: expected dtype.
    """
    header = _header(np.dtype(dtype), shape)
    for path in cache_folder().glob(f"{tree_key}-{content_key}-*.npy"):
        # Compared, because numpy's parser raises exceptions of any type for a damaged header.
        with suppress(OSError, ValueError), path.open("rb") as file:
            if file.read(len(header)) == header:
                array = np.memmap(path, dtype, "r", len(header), shape)
                if path.stem.endswith(_checksum(array)):
                    return array
    return None


def save_mapped(tree_key: str, content_key: str, array: NDArray[Any]) -> None:
    """Cache the array of a tree, replacing an earlier one; do nothing if the folder cannot be written.

    Args:
        tree_key: key of the tree of files.
        content_key: key of the tree's current content.
        array: array to cache, in C order.
    """
    old = list(cache_folder().glob(f"{tree_key}-*.npy"))
    name = f"{tree_key}-{content_key}-{_checksum(array)}.npy"
    if _save(name, _header(array.dtype, array.shape), array):
        for path in old:
            if path.name != name:
                path.unlink(missing_ok=True)


def _header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Return the header of a .npy file of an array in C order."""
    header = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, fields)
    return header.getvalue()


def _checksum(array: NDArray[Any]) -> str:
    return f"{google_crc32c.value(np.ascontiguousarray(array).view(np.uint8)):08x}"


def _save(name: str, *pieces: Any) -> bool:
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / name, *pieces)
    except OSError:
        return False
    return True
