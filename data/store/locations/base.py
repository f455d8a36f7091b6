"""The interface between a store and the place where its objects are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AbstractContextManager

    import numpy as np
    from numpy.typing import NDArray


class Mapped(Protocol):
    """One object, open for reading."""

    content: NDArray[np.uint8]
    """Its bytes: a memory map, or an array in memory."""

    def size(self) -> int:
        """Bytes that the object has now; fewer than `content` if it was cut short since."""

    def is_touched(self) -> bool:
        """Whether the object may have been changed in place since it was opened."""

    def advise(self, start: int, length: int) -> None:
        """Have some bytes read in the background."""


class Location(Protocol):
    """Objects by their keys, as an object store keeps them: a key is a path with `/`, relative to the store.

    Objects are written whole and never in part. Operations on an object raise `FileNotFoundError` where there
    is none and other `OSError`s where it cannot be read or written. A location can be pickled.
    """

    @property
    def name(self) -> str:
        """Last part of the address, for tables and errors."""

    @property
    def has_locks(self) -> bool:
        """Whether `lock` keeps other processes out."""

    def where(self, key: str) -> str:
        """Address of an object, for errors. The location's own address is `str(location)`."""

    def put(self, key: str, *pieces: bytes | NDArray[Any]) -> None:
        """Write an object, atomically and durably, whether or not there is one."""

    def create(self, key: str, data: bytes) -> str | None:
        """Write an object if there is none; returns its tag, or None if there was one."""

    def replace(self, key: str, data: bytes, tag: str) -> str | None:
        """Write an object if the one that is there has the tag; returns the new tag, or None otherwise."""

    def tag(self, key: str) -> str | None:
        """Tag of an object: objects with other content have other tags. None if there is no object."""

    def get(self, key: str, most_bytes: int) -> bytes:
        """Read an object.

        Raises:
            ValueError: it is larger than `most_bytes`; worded to follow its name.
        """

    def get_tagged(self, key: str, most_bytes: int) -> tuple[bytes, str]:
        """Read an object and its tag."""

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """Read some bytes of an object."""

    def size(self, key: str) -> int:
        """Bytes of an object."""

    def map(self, key: str, *, resident: bool = False) -> Mapped:
        """Open an object for reading by address; `resident` reads it into memory."""

    def names(self, folder: str) -> list[str]:
        """Names of the objects directly in a folder, sorted."""

    def delete(self, key: str) -> None:
        """Remove an object if it is there."""

    def make_way(self, keys: Iterable[str]) -> None:
        """Remove what would keep `put` from writing these keys, if it is empty.

        Raises:
            StoreDamaged: something is in the way that may be worth keeping; nothing was removed.
        """

    def sweep(self, folder: str, wanted: Callable[[str], bool]) -> None:
        """Remove what interrupted calls of `put` left in a folder, of objects whose names are wanted."""

    def lock(self) -> AbstractContextManager[None]:
        """Keep out other processes that take this lock; may be taken again by who holds it.

        Saves work and keeps metadata in step where the location has locks. The manifest does not depend on
        it: `create` and `replace` refuse what another process has overtaken.
        """

    def hold(self, key: str, data: bytes) -> AbstractContextManager[Callable[[bytes], None]]:
        """Write an object that is held for the time of the context; gives a function that replaces it."""

    def held(self, folder: str) -> list[tuple[str, bytes]]:
        """Keys and contents of the objects of a folder that a live process holds."""

    def free_bytes(self) -> int:
        """Free space."""

    def zarr_store(self) -> Any:
        """What `zarr.open_array(store=...)` reads from."""
