"""The cache folder: what was learned about a data set's files, so that the next start is quick.

Everything in it can be deleted at any time. A folder that cannot be written only makes things slower, and a
damaged file is as good as none.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np

from coursepack.files import write_whole

if TYPE_CHECKING:
    from numpy.typing import NDArray

VARIABLE = "COURSEPACK_CACHE"


def cache_folder() -> Path:
    """`$COURSEPACK_CACHE`, else `coursepack` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if given := os.environ.get(VARIABLE):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "coursepack"


def key_of(*parts: str) -> str:
    """A short name for what the parts say."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def load_facts(key: str) -> dict[str, NDArray[Any]] | None:
    """Arrays kept under a key, or None if there are none that can be read."""
    try:
        # From memory: numpy leaves a damaged file open.
        content = io.BytesIO((cache_folder() / f"{key}.npz").read_bytes())
        with np.load(content, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None


def save_facts(key: str, facts: dict[str, NDArray[Any]]) -> None:
    """Keep arrays under a key, in place of what was there; nothing happens if that is impossible."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **facts)
    _save(f"{key}.npz", buffer.getbuffer())


def load_pixels(place: str, key: str, shape: tuple[int, ...]) -> NDArray[np.uint8] | None:
    """The array kept for a place under a key, mapped read-only, if it is there and undamaged."""
    for path in cache_folder().glob(f"{place}-{key}-*.npy"):
        try:
            pixels = np.lib.format.open_memmap(path, mode="r")
        except (OSError, ValueError, EOFError):
            continue
        if pixels.dtype == np.uint8 and pixels.shape == shape and path.stem.endswith(_checksum(pixels)):
            return pixels
    return None


def save_pixels(place: str, key: str, pixels: NDArray[np.uint8]) -> None:
    """Keep an array for a place in place of what was there; nothing happens if that is impossible."""
    old = list(cache_folder().glob(f"{place}-*.npy"))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(pixels))
    name = f"{place}-{key}-{_checksum(pixels)}.npy"
    if _save(name, header.getvalue(), pixels):
        for path in old:
            if path.name != name:
                path.unlink(missing_ok=True)


def _checksum(pixels: NDArray[np.uint8]) -> str:
    return f"{google_crc32c.value(np.ascontiguousarray(pixels)):08x}"


def _save(name: str, *pieces: Any) -> bool:
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / name, *pieces)
    except OSError:
        return False
    return True
