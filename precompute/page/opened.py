"""Stores of a page, as far as they can be opened."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coursepack.data.store import StoreReader, load_manifest
from coursepack.data.store.identity import check_complete
from coursepack.data.store.locations import open_location
from coursepack.errors import CoursepackError, StoreIncomplete
from coursepack.precompute.verify import check_same_pixels

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from coursepack.data.store import Manifest


@dataclass(frozen=True)
class OpenedStore:
    """Store of a page."""

    index: int
    """Index among the stores of the page; group of what the page shows about it."""
    label: str
    """Name without folders and `.zarr`; the address if two names are the same."""
    address: str
    manifest: Manifest
    reader: StoreReader | None
    """None for a store without a committed view."""


@dataclass
class Problems:
    """Defects of stores, and what was left out of the page, with the reason."""

    texts: list[str] = field(default_factory=list)

    def add(self, text: object) -> None:
        """Add a problem, unless it is known."""
        if str(text) not in self.texts:
            self.texts.append(str(text))

    @contextmanager
    def instead_of(self, part: str) -> Iterator[None]:
        """Catch an error of this package or of the system in a part of the page, and add it as a problem."""
        try:
            yield
        except (CoursepackError, OSError) as error:
            self.add(f"{part} left out: {error}")


def open_stores(stores: Sequence[str | Path], problems: Problems) -> list[OpenedStore]:
    """Open stores of one source and one view recipe; those without a committed view have no reader.

    Raises:
        StoreNotFound, StoreMismatch, StoreDamaged: a manifest cannot be read, or the stores were written from
            different pixels.
    """
    manifests = [load_manifest(store) for store in stores]
    for store, manifest in zip(stores, manifests, strict=True):
        check_complete(manifest, str(store))
    check_same_pixels(manifests)
    names = [open_location(store).name.removesuffix(".zarr") for store in stores]
    labels = names if len(set(names)) == len(names) else [str(store) for store in stores]
    opened = []
    for index, (store, manifest) in enumerate(zip(stores, manifests, strict=True)):
        reader = None
        try:
            reader = StoreReader(store)
        except StoreIncomplete as error:
            problems.add(error)
        opened.append(OpenedStore(index, labels[index], str(store), manifest, reader))
    return opened


def common_views(opened: Sequence[OpenedStore]) -> list[int]:
    """Return the views that all stores with committed views have, in order; empty if none has any."""
    views = [set(store.reader.views) for store in opened if store.reader is not None]
    return sorted(set.intersection(*views)) if views else []
