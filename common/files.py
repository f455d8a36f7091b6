"""Whole-file writes that a kill or a power cut cannot tear."""

from __future__ import annotations

import os
import platform
import re
import secrets
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

PARTIAL = ".partial"
HOST_LENGTH = 32
"""Characters of the host's name in the name of a partial file."""


def write_whole(path: Path, *pieces: bytes | NDArray[Any]) -> None:
    """Write a file so that `path` holds either its old content or all of the new.

    The pieces go to a `.partial` file beside it, are flushed to the disk, and take the name by a rename that
    is flushed too. A kill leaves at most that file, which no reader opens.

    Raises:
        OSError: the disk is full or the folder cannot be written; `path` is as it was.
    """
    partial = path.with_name(_partial_name(path.name))
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


def _partial_name(name: str) -> str:
    """A name for the partial file that no other process uses, on this host or on others that share the disk.

    A process number alone is not enough: containers and hosts number their processes alike.
    """
    host = re.sub("[^A-Za-z0-9-]", "-", platform.node())[:HOST_LENGTH]
    return f"{name}.{host}.{os.getpid()}.{secrets.token_hex(4)}{PARTIAL}"


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
