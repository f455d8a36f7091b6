"""Whole-file writes that a kill or a power cut cannot tear."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

PARTIAL = ".partial"


def write_whole(path: Path, *pieces: bytes | NDArray[Any]) -> None:
    """Write a file so that `path` holds either its old content or all of the new.

    The pieces go to `<name>.<pid>.partial` beside it, are flushed to the disk, and take the name by a rename
    that is flushed too. A kill leaves at most a `.partial` file, which no reader looks at.

    Raises:
        OSError: the disk is full or the folder cannot be written; `path` is as it was.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with partial.open("wb", buffering=0) as file:
            for piece in pieces:
                # numpy's types know nothing of buffers before Python 3.12.
                rest = memoryview(piece).cast("B")  # type: ignore[arg-type, unused-ignore]  # stubs differ between Pythons
                while rest:
                    rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partials(folder: Path) -> Iterator[Path]:
    """What killed writers left in `folder`."""
    if folder.is_dir():
        yield from sorted(path for path in folder.iterdir() if path.name.endswith(PARTIAL))
