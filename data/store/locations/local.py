"""Local folders as locations: one file per object, atomic writes, memory maps and `flock` locks."""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from coursepack.data.store.locations.resident import Resident, read_whole
from coursepack.errors import StoreDamaged
from coursepack.files import create_whole, naming, open_regular, partials, write_whole

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]  # a module that Windows does not have

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from coursepack.data.store.locations.base import PieceCheck

LOCK = "lock"
"""Name of the file that `LocalLocation.lock` locks."""
MAX_HELD_BYTES = 1 << 16


class LocalLocation:
    """A location in a local folder, with one file per object. See `Location` for the methods."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._locks = 0

    def __reduce__(self) -> tuple[type[LocalLocation], tuple[Path]]:
        return LocalLocation, (self.root,)

    def __str__(self) -> str:
        return str(self.root)

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.root.name

    @property
    def has_locks(self) -> bool:
        """True if the platform supports `flock`."""
        return fcntl is not None

    @property
    def is_remote(self) -> bool:
        """False: files are mapped."""
        return False

    def where(self, key: str) -> str:
        """Return the path of a file."""
        return str(self.root / key)

    def begin_writing(self, *, single_writer: bool) -> None:
        """Do nothing: files are compared and replaced under a lock."""

    def put(self, key: str, *pieces: bytes | NDArray[Any]) -> None:
        """Write a file, creating parent folders as needed."""
        path = self._with_folder(key)
        write_whole(path, *pieces)

    def create(self, key: str, data: bytes) -> str | None:
        """Write a file under a temporary name, then link it to its own name, which fails if that exists."""
        path = self._with_folder(key)
        with self.lock():
            return _tag(data) if create_whole(path, data) else None

    def replace(self, key: str, data: bytes, tag: str) -> str | None:
        """Compare the tag and write the file while holding the lock."""
        with self.lock():
            if self.tag(key) != tag:
                return None
            self.put(key, data)
            return _tag(data)

    def tag(self, key: str) -> str | None:
        """Return the sha256 of a file's content."""
        try:
            return _tag((self.root / key).read_bytes())
        except FileNotFoundError:
            return None

    def get(self, key: str, max_bytes: int) -> bytes:
        """Read a file."""
        path = self.root / key
        with naming(path), os.fdopen(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise ValueError(f"has {size:,} bytes, expected at most {max_bytes:,}")
            return file.read(size)

    def get_tagged(self, key: str, max_bytes: int) -> tuple[bytes, str]:
        """Read a file and compute its tag."""
        data = self.get(key, max_bytes)
        return data, _tag(data)

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """Read bytes `start` to `stop` of a file."""
        with os.fdopen(open_regular(self.root / key), "rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def size(self, key: str) -> int:
        """Return the size of a file in bytes."""
        descriptor = open_regular(self.root / key)
        try:
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)

    def modified(self, key: str) -> float:
        """Return the modification time of a file."""
        return (self.root / key).stat().st_mtime

    def map(
        self, key: str, *, resident: bool = False, check: PieceCheck | None = None
    ) -> MappedFile | Resident:
        """Memory-map a file, or read it into memory if `resident`."""
        path = self.root / key
        with naming(path), os.fdopen(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if resident or size == 0:  # an empty file cannot be mapped
                return Resident(read_whole(file, size, check))
            return MappedFile(path, file)

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of the files in a folder, except files being written."""
        path = self.root / folder
        if not path.is_dir():
            return []
        unfinished = {partial.name for partial in partials(path)}
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_file() and entry.name not in unfinished)

    def delete(self, key: str) -> None:
        """Remove a file if it exists."""
        (self.root / key).unlink(missing_ok=True)

    def make_way(self, keys: Iterable[str]) -> None:
        """Remove empty folders at the paths of files."""
        keys = list(keys)
        root = self.root
        folders = [root / key for key in keys if (root / key).is_dir() and not (root / key).is_symlink()]
        parents = {
            root.joinpath(*key.split("/")[:depth]) for key in keys for depth in range(1, key.count("/") + 1)
        }
        full = [f"{str(folder)!r} is a folder that holds something, expected a file" for folder in folders
                if any(folder.iterdir())]  # fmt: skip
        other = [f"{str(parent)!r} is not a folder" for parent in sorted(parents)
                 if os.path.lexists(parent) and not parent.is_dir()]  # fmt: skip
        if full or other:
            raise StoreDamaged(f"{'; '.join(full + other)}: move that away and run the same command again")
        for folder in folders:
            folder.rmdir()

    def sweep(self, folder: str, wanted: Callable[[str], bool]) -> None:
        """Remove partial files of interrupted writes."""
        for path in partials(self.root / folder):
            if wanted(path.name):
                path.unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold an flock on the file `lock`, if the platform supports it."""
        if self._locks:
            self._locks += 1
            try:
                yield
            finally:
                self._locks -= 1
            return
        path = self._with_folder(LOCK)
        with os.fdopen(open_regular(path, os.O_WRONLY | os.O_CREAT), "wb") as file:
            with naming(path):
                _flock(file)
            self._locks = 1
            try:
                yield
            finally:
                self._locks = 0

    @contextmanager
    def hold(self, key: str, data: bytes) -> Iterator[Callable[[bytes], None]]:
        """Hold an flock on a file. The lock ends with the process, however that exits; the file remains."""
        path = self._with_folder(key)
        with path.open("wb", buffering=0) as file:

            def write(data: bytes) -> None:
                # A single write over the old text: concurrent readers get either the old or the new text.
                with naming(path):
                    file.seek(0)
                    file.write(data)

            with naming(path):
                _flock(file)
            write(data)
            yield write

    def held(self, folder: str) -> list[tuple[str, bytes]]:
        """Return the files held by a live process; empty if the platform has no `flock`."""
        found: list[tuple[str, bytes]] = []
        if fcntl is None:
            return found
        for name in self.names(folder):
            with (self.root / folder / name).open("rb") as file:
                try:
                    # A shared lock, so that concurrent calls do not report each other as holders.
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    found.append((f"{folder}/{name}", file.read(MAX_HELD_BYTES)))
        return found

    def free_bytes(self) -> int:
        """Return the free bytes of the file system of the folder, which need not exist yet."""
        place = self.root.absolute()
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free

    def zarr_store(self) -> Path:
        """Return the path of the folder."""
        return self.root

    def _with_folder(self, key: str) -> Path:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class MappedFile:
    """A memory-mapped file."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path = path
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._stamp = _Stamp.of(os.fstat(file.fileno()))
        self.content: NDArray[np.uint8] = np.frombuffer(self._map, dtype=np.uint8)

    def size(self) -> int:
        """Return the size of the mapped file in bytes, even if another file has replaced it at its path."""
        return self._map.size()

    def is_touched(self) -> bool:
        """Return True if the mapped file is still at its path and was modified since it was mapped."""
        try:
            found = _Stamp.of(self._path.stat())
        except FileNotFoundError:
            return False
        # An atomic replacement creates another inode; the map still refers to the old file.
        return found != self._stamp and found.inode == self._stamp.inode

    def advise(self, start: int, length: int) -> None:
        """Advise the system to read a range of bytes in the background."""
        if hasattr(mmap, "MADV_WILLNEED"):
            aligned = start - start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, aligned, length + start - aligned)


class _Stamp(NamedTuple):
    """File attributes that change when the file is modified."""

    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, status: os.stat_result) -> _Stamp:
        """Create a stamp from a file's status."""
        return cls(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _tag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _flock(file: IO[bytes]) -> None:
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX)
