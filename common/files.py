"""Atomic file writes that survive a killed process and a power cut."""

from __future__ import annotations

import errno
import os
import platform
import re
import secrets
import stat
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

PARTIAL = ".partial"
"""Suffix of files that are being written."""
HOST_LENGTH = 32
"""Maximum number of characters of the host's name in the name of a partial file."""
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a device",
    stat.S_IFCHR: "a device",
}
"""Names of the kinds of files that are not regular, by their `stat` type."""
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""Errors of file systems that have no hard links."""


def write_whole(path: Path, *pieces: bytes | NDArray[Any]) -> None:
    """Replace the content of a file atomically.

    The pieces are written one after the other to a `.partial` file in the same folder, flushed to disk and
    renamed to `path`; the rename is flushed too. At every moment `path` has either its old content or all of
    the new. A killed process leaves at most the `.partial` file, which no reader opens.

    Raises:
        OSError: the disk is full or the folder is not writable. `path` is unchanged, and the error names it.
    """
    with _partial_file(path, pieces) as partial:
        partial.replace(path)
    flush_folder(path.parent)


def write_pieces(path: Path, pieces: Iterable[bytes]) -> int:
    """Replace the content of a file as `write_whole` does, with pieces that are made while it is written.

    Returns:
        The size of the file in bytes.
    """
    with _partial_file(path, pieces) as partial:
        size = partial.stat().st_size
        partial.replace(path)
    flush_folder(path.parent)
    return size


def create_whole(path: Path, *pieces: bytes | NDArray[Any]) -> bool:
    """Write a file as `write_whole` does, but only if there is none of the name; returns whether it did.

    The name is taken by a hard link, which one of several processes can make. On file systems without those,
    the name is looked up first: there, processes have to hold a lock while they create.

    Raises:
        OSError: as `write_whole`.
    """
    with _partial_file(path, pieces) as partial:
        try:
            path.hardlink_to(partial)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            if path.exists():
                return False
            partial.replace(path)
    flush_folder(path.parent)
    return True


@contextmanager
def _partial_file(path: Path, pieces: Iterable[bytes | NDArray[Any]]) -> Iterator[Path]:
    """A flushed file of these pieces beside `path`, gone afterwards unless it was renamed."""
    partial = path.with_name(_partial_name(path.name))
    try:
        with partial.open("wb", buffering=0) as file:
            for piece in pieces:
                # numpy's type stubs lack the buffer protocol before Python 3.12.
                rest = memoryview(piece).cast("B")  # type: ignore[arg-type, unused-ignore]  # stubs differ between Pythons
                while rest:
                    rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        yield partial
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def _partial_name(name: str) -> str:
    """Return a name for a partial file that is unique among the processes of all hosts that share the disk.

    The process id alone is not enough, because hosts and containers reuse the same ids.
    """
    host = re.sub("[^A-Za-z0-9-]", "-", platform.node())[:HOST_LENGTH]
    return f"{name}.{host}.{os.getpid()}.{secrets.token_hex(4)}{PARTIAL}"


def flush_folder(folder: Path) -> None:
    """Flush the directory entries of a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add this path to system errors that name no file, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def open_regular(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file and return its descriptor. A FIFO at the path does not block.

    Can be given to `open` as its `opener`.

    Raises:
        OSError: the file cannot be opened, or is not a regular file.
    """
    try:
        descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a FIFO that is opened for writing
            raise _not_regular(path, Path(path).stat().st_mode) from error
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise _not_regular(path, mode)
    return descriptor


def _not_regular(path: str | Path, mode: int) -> OSError:
    kind = KINDS.get(stat.S_IFMT(mode), "something else")
    return OSError(errno.EINVAL, f"It is {kind}, expected a regular file", str(path))


def partials(folder: Path) -> Iterator[Path]:
    """Yield the partial files that killed processes left in a folder."""
    if folder.is_dir():
        # Names first: a folder may hold very many files, and hardly any of them partial.
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.name.endswith(PARTIAL))
        yield from (folder / name for name in names)
