"""Storage locations of stores: local folders and object stores.

base      the interface: atomic writes, creation, and replacement conditional on a tag
local     files in a folder
s3        objects in a bucket: S3 and services like it, Google Cloud Storage, Azure
services  the variables and errors of these services
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from coursepack.data.store.locations.local import LocalLocation
from coursepack.data.store.locations.s3 import BucketLocation
from coursepack.data.store.locations.services import SERVICES
from coursepack.errors import UnknownName

if TYPE_CHECKING:
    from collections.abc import Callable

    from coursepack.data.store.locations.base import Location

SEPARATOR = "://"


def open_location(where: str | Path | Location) -> Location:
    """Return the location at an address: `SCHEME://...`, or the path of a folder, which need not exist.

    Raises:
        UnknownName: the scheme is not registered in `LOCATIONS`.
        RecipeError: the rest of the address does not fit the scheme.
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


def open_group(where: str) -> Location:
    """Return the location through which replicas exchange weights, at an address as of `open_location`.

    Raises:
        UnknownName, RecipeError: as `open_location`; the message speaks of a group.
    """
    scheme, separator, rest = where.partition(SEPARATOR)
    if separator and scheme in SERVICES:
        return BucketLocation(scheme, rest, "group")
    return open_location(where)


def open_bucket(scheme: str, rest: str) -> BucketLocation:
    """Return the folder `SCHEME://REST` of a source's files, which may be a bucket itself.

    Raises:
        UnknownName: there is no such scheme.
        RecipeError: the rest of the address does not fit the scheme.
    """
    if scheme not in SERVICES:
        raise UnknownName("kind of location", scheme + SEPARATOR, [name + SEPARATOR for name in SERVICES])
    return BucketLocation(scheme, rest, "source")


def path_or_address(text: str) -> str | Path:
    """Return an address `SCHEME://...` unchanged, and anything else as a path."""
    return text if SEPARATOR in text else Path(text)


def absolute_address(where: str | Path) -> str:
    """Return an address unchanged, and a path made absolute, with symbolic links resolved."""
    where = path_or_address(str(where))
    return where if isinstance(where, str) else str(where.resolve())


LOCATIONS: dict[str, Callable[[str], Location]] = {
    "file": lambda rest: LocalLocation(Path(rest)),
    **{scheme: partial(BucketLocation, scheme) for scheme in SERVICES},
}
"""Constructors of locations, by URL scheme."""
