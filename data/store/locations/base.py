"""The interface between a store and its storage backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AbstractContextManager

    import numpy as np
    from numpy.typing import NDArray


class PieceCheck(Protocol):
    """Check of the content of an object while it is read."""

    @property
    def step(self) -> int:
        """Size in bytes that the sizes of pieces are multiples of, except that of the last."""

    def check(self, content: NDArray[np.uint8], start: int, stop: int) -> None:
        """Check bytes `start` to `stop`, which have been read."""


class Mapped(Protocol):
    """One object, open for reading."""

    content: NDArray[np.uint8]
    """Content of the object: a memory map, or an array in memory."""

    def size(self) -> int:
        """Return the current size in bytes; smaller than `content` if the object was truncated meanwhile."""

    def is_touched(self) -> bool:
        """Return True if the object may have been modified in place since it was opened."""

    def advise(self, start: int, length: int) -> None:
        """Request that a range of bytes be read in the background."""


class Location(Protocol):
    """Key-value storage of objects. A key is a path relative to the store, with `/` as separator.

    Objects are always written as a whole. Operations on an object raise `FileNotFoundError` if it does not
    exist and other `OSError`s if it cannot be read or written. Locations can be pickled.
    """

    @property
    def name(self) -> str:
        """Last component of the address, for tables and error messages."""

    @property
    def has_locks(self) -> bool:
        """True if `lock` excludes other processes."""

    @property
    def is_remote(self) -> bool:
        """True if objects are read over a network, so that `map` reads them into memory."""

    def where(self, key: str) -> str:
        """Return the address of an object, for errors. The address of the location is `str(location)`."""

    def begin_writing(self, *, single_writer: bool) -> None:
        """Check that `create` and `replace` detect concurrent changes, before a store is first written to.

        Args:
            single_writer: accept a location where they do not, as no other process writes to it.
        """

    def put(self, key: str, *pieces: bytes | NDArray[Any]) -> None:
        """Write an object atomically and durably, replacing any existing one."""

    def create(self, key: str, data: bytes) -> str | None:
        """Write an object unless it exists; returns its tag, or None if it exists."""

    def replace(self, key: str, data: bytes, tag: str) -> str | None:
        """Replace an object if its current tag is `tag`; returns the new tag, or None otherwise."""

    def tag(self, key: str) -> str | None:
        """Return the tag of an object, which identifies its content, or None if there is no object."""

    def get(self, key: str, max_bytes: int) -> bytes:
        """Read an object.

        Raises:
            ValueError: the object is larger than `max_bytes`; the message is worded to follow its name.
        """

    def get_tagged(self, key: str, max_bytes: int) -> tuple[bytes, str]:
        """Read an object and its tag."""

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """Read bytes `start` to `stop` of an object."""

    def size(self, key: str) -> int:
        """Return the size of an object in bytes."""

    def modified(self, key: str) -> float:
        """Return the time of an object's last write, in seconds since the epoch."""

    def map(self, key: str, *, resident: bool = False, check: PieceCheck | None = None) -> Mapped:
        """Memory-map an object for reading; if `resident`, read it into memory instead.

        Args:
            key: the object.
            resident: read into memory.
            check: check of pieces, which a location may call while it reads into memory.
        """

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of the objects directly in a folder."""

    def delete(self, key: str) -> None:
        """Remove an object if it exists."""

    def make_way(self, keys: Iterable[str]) -> None:
        """Remove empty obstacles, such as folders, that prevent `put` from writing these keys.

        Raises:
            StoreDamaged: an obstacle is not empty; nothing is removed.
        """

    def sweep(self, folder: str, wanted: Callable[[str], bool]) -> None:
        """Remove leftovers of interrupted `put` calls from a folder, for the names that `wanted` selects."""

    def lock(self) -> AbstractContextManager[None]:
        """Hold an exclusive lock on the location. The lock is reentrant.

        It avoids duplicate work and keeps metadata consistent if the location has locks. The manifest does
        not depend on it: `create` and `replace` detect concurrent changes by other processes.
        """

    def hold(self, key: str, data: bytes) -> AbstractContextManager[Callable[[bytes], None]]:
        """Write an object and hold it within the context; yields a function that replaces its content."""

    def held(self, folder: str) -> list[tuple[str, bytes]]:
        """Return keys and contents of the objects in a folder that are held by a live process."""

    def free_bytes(self) -> int:
        """Return the free space in bytes."""

    def zarr_store(self) -> Any:
        """Return the store to pass to `zarr.open_array(store=...)`."""
