"""Storage locations of stores: local folders and object stores.

base    the interface: atomic writes, creation, and replacement conditional on a tag
local   files in a folder
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from coursepack.data.store.locations.local import LocalLocation
from coursepack.errors import UnknownName

if TYPE_CHECKING:
    from collections.abc import Callable

    from coursepack.data.store.locations.base import Location

SEPARATOR = "://"


def open_location(where: str | Path | Location) -> Location:
    """Return the location at an address: `SCHEME://...`, or the path of a folder, which need not exist.

    Raises:
        UnknownName: the scheme is not registered in `LOCATIONS`.
    """
    if isinstance(where, Path):
        return LocalLocation(where)
    if not isinstance(where, str):
        return where
    scheme, separator, rest = where.partition(SEPARATOR)
    if not separator:
        return LocalLocation(Path(where))
    if scheme not in LOCATIONS:
        known = [name + SEPARATOR for name in LOCATIONS]
        raise UnknownName("kind of location", scheme + SEPARATOR, known)
    return LOCATIONS[scheme](rest)


LOCATIONS: dict[str, Callable[[str], Location]] = {"file": lambda rest: LocalLocation(Path(rest))}
"""Constructors of locations, by URL scheme."""
