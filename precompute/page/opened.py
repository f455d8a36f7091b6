"""Stores of a page, as far as they can be opened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from coursepack.data.store import StoreReader, load_manifest
from coursepack.data.store.identity import check_complete
from coursepack.data.store.locations import open_location
from coursepack.errors import StoreIncomplete
from coursepack.precompute.verify import check_same_pixels

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from coursepack.data.store import Manifest
    from coursepack.pages.problems import Problems


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
