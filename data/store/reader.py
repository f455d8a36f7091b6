"""Reader of stores: copies rows of committed views directly from memory or memory maps.

There is no asyncio, no codec pipeline and no worker process. A view is opened once: its shard files are
mapped (or read), their sizes and checksums are compared with the manifest, and the address of every chunk is
computed. Each batch is then one serial copy of rows per array. Other Zarr readers silently return NaN for a
missing file; this one raises an error for every file that is not in the manifest.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from coursepack.data.store.layout import shard_key, table_key
from coursepack.data.store.locations import open_location
from coursepack.data.store.manifest import LABELS, STATIC
from coursepack.data.store.mapping import Check, OpenView, ShardFile, buffer, gather
from coursepack.data.store.opening import load_manifest
from coursepack.errors import StoreDamaged, StoreIncomplete, UnknownName

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from coursepack.data.randomness import Samples
    from coursepack.data.store.cache import ShardCache
    from coursepack.data.store.locations.base import Location
    from coursepack.data.store.mapping import Shards
    from coursepack.kernels import Rows

OPEN_VIEWS = 64
"""Maximum number of open views per array; the view used least recently is closed first."""
RESIDENT_BYTES = 256 << 20
"""Maximum size in bytes of the resident views of an array; at least two views are kept open."""

Reading = Literal["resident", "mapped", "windowed"]
"""`resident`: whole views in memory. `mapped`: memory maps, for views that fit into the page cache.
`windowed`: memory maps whose chunks are verified on first access, for views that do not fit."""


class StoreReader:
    """Reader of the committed views of a store. Safe to pickle and to use after a fork."""

    def __init__(
        self, where: str | Path | Location, reading: Reading = "mapped", cache: ShardCache | None = None
    ) -> None:
        """Open a store and read its manifest.

        Args:
            where: path or address of the store.
            reading: access mode; see `Reading`. Views in a bucket are always resident without a cache.
            cache: cache of the shards of a store in a bucket.

        Raises:
            StoreNotFound, StoreMismatch, StoreDamaged: as `load_manifest`.
            StoreIncomplete: no view is committed.
        """
        self.location = open_location(where)
        self.cache = cache
        self.reading: Reading = "resident" if self.location.is_remote and cache is None else reading
        self.manifest = load_manifest(self.location)
        self.views = self.manifest.committed_views(["logits"])
        if not self.views:
            raise StoreIncomplete(
                f"store {self.address!r} has committed none of its {self.manifest.views} views. "
                "Run the same `precompute run` again; it goes on where it stopped."
            )
        self.pinned = False
        self._open: dict[tuple[str, int], OpenView] = {}
        self._used: dict[tuple[str, int], float] = {}
        """Time of the last use of each view."""
        self._verified: set[str] = set()
        self._lock, self._pid = threading.Lock(), os.getpid()

    def __reduce__(self) -> tuple[type[StoreReader], tuple[Location, Reading, ShardCache | None]]:
        return StoreReader, (self.location, self.reading, self.cache)

    @property
    def address(self) -> str:
        """Address of the store, as passed to commands."""
        return str(self.location)

    @property
    def path(self) -> Path:
        """Folder of the store; valid only for local stores."""
        return Path(self.address)

    @property
    def name(self) -> str:
        """Name of the store for tables and errors: the last component of its address without `.zarr`."""
        return self.location.name.removesuffix(".zarr")

    def view_bytes(self, arrays: Iterable[str]) -> int:
        """Return the size in bytes of one view of the given arrays."""
        return self.manifest.samples * sum(self.manifest.arrays[name].row_bytes for name in arrays)

    def chunk_rows(self, arrays: Iterable[str]) -> int:
        """Return the largest number of rows per chunk among the given arrays."""
        components = (self.manifest.arrays[name].components.values() for name in arrays)
        return max(layout.chunk_rows for layouts in components for layout in layouts)

    def labels(self) -> NDArray[np.int64]:
        """Return the class ids `(N,)` of all samples."""
        return self.table(LABELS)

    def static(self, name: str) -> NDArray[np.float32]:
        """Return a constant of the teacher: `head_weight (C, D)`, `head_bias (C,)`, the margins of a tap, or
        the shape that a sketched tap has before its projection.

        Raises:
            UnknownName: the store has no constant of that name.
        """
        return self.table(f"{STATIC}/{name}")

    def table(self, name: str) -> NDArray[Any]:
        """Return a whole array without views.

        Raises:
            UnknownName: the store has no such table.
            StoreDamaged: the file does not match the manifest.
        """
        return np.concatenate(list(self.table_pieces(name)))

    def table_pieces(self, name: str) -> Iterator[NDArray[Any]]:
        """Yield the rows of an array without views chunk by chunk, to read a large one without a copy.

        Raises:
            UnknownName, StoreDamaged: as `table`.
        """
        if name not in self.manifest.tables:
            raise UnknownName(f"table of store {self.address!r}", name, self.manifest.tables)
        table = self.manifest.tables[name]
        shards = [self._vouched(table_key(name, table.layout))]
        opened = OpenView({name: (table.layout, shards)}, table.rows, resident=True, check="files")
        yield from opened.pieces()

    def components(self, array: str, view: int, samples: Samples) -> dict[str, NDArray[Any]]:
        """Return the stored components `(n, *row_shape)` of one array for the given samples of one view.

        Raises:
            UnknownName: the store has no such array.
            StoreIncomplete: the view is not committed for that array.
            StoreDamaged: a file does not match the manifest.
            IndexError: a sample is out of range.
        """
        self._check_committed(array, view)
        try:
            (found,) = gather([self._opened(array, view)], samples)
        except StoreDamaged:
            if not self._discard_damaged(array, view):
                raise
            (found,) = gather([self._opened(array, view)], samples)
        return found

    def open(self, array: str, view: int) -> None:
        """Open and check the files of a view, as the first call of `rows` does.

        Raises:
            UnknownName, StoreIncomplete, StoreDamaged: as `components`.
        """
        self.components(array, view, np.empty(0, np.int64))

    def rows(self, array: str, views: int | Samples, samples: Samples) -> Rows:
        """Return encoded rows `(n, *row_shape)` of one view, or of one view per sample `(n,)`.

        Raises:
            StoreDamaged: a file does not match the manifest, or rows are invalid for the encoding even though
                their checksums match.
            UnknownName, StoreIncomplete, IndexError: as `components`.
        """
        if isinstance(views, int):
            parts = self.components(array, views, samples)
        else:
            parts = self._mixed(array, views, samples)
        return self._rows_of(array, parts)

    def _check_committed(self, array: str, view: int) -> None:
        if array not in self.manifest.arrays:
            raise UnknownName(f"array of store {self.address!r}", array, self.manifest.arrays)
        if view not in self.manifest.committed.get(array, ()):
            raise StoreIncomplete(
                f"view {view} of {array!r} is not committed in store {self.address!r} "
                f"(committed: {list(self.manifest.committed.get(array, ()))})"
            )

    def _rows_of(self, array: str, parts: dict[str, NDArray[Any]]) -> Rows:
        """Return stored components as encoded rows."""
        stored = self.manifest.arrays[array]
        tensors = {name: torch.from_numpy(part) for name, part in parts.items()}
        try:
            return stored.encoding.rows(tensors, stored.row_shape)
        except ValueError as error:
            raise StoreDamaged(
                f"rows of {array!r} in store {self.address!r} are not {stored.encoding.name}: {error}. "
                f"Run `precompute verify --store {self.address} --deep 1000`, or write the store again."
            ) from error

    def _mixed(self, array: str, views: Samples, samples: Samples) -> dict[str, NDArray[Any]]:
        parts = {
            name: buffer(len(samples) * layout.row_bytes, pinned=self.pinned)
            .view(np.dtype(layout.dtype))
            .reshape(len(samples), *layout.row_shape)
            for name, layout in self.manifest.arrays[array].components.items()
        }
        for view in np.unique(views):
            chosen = views == view
            for name, part in self.components(array, int(view), samples[chosen]).items():
                parts[name][chosen] = part
        return parts

    def prefetch(self, array: str, view: int) -> threading.Thread | None:
        """Open and verify a view in a background thread; a read of the view waits until it is open.

        Returns:
            The background thread, or None if the view is already open.
        """
        if (array, view) in self._open:
            return None
        thread = threading.Thread(target=self._open_quietly, args=(array, view), daemon=True)
        thread.start()
        return thread

    def will_need(self, array: str, view: int, samples: Samples) -> None:
        """Advise the system to read the chunks of these samples in the background."""
        self._opened(array, view).will_need(samples)

    def check_unchanged(self) -> None:
        """Check that mapped files have not been changed since they were opened.

        Raises:
            StoreDamaged: a file was changed; names the first such file.
        """
        for opened in list(self._open.values()):
            opened.check_unchanged()

    def _open_quietly(self, array: str, view: int) -> None:
        # A later read of the view raises the same error. Threads of an interpreter that ends start no others.
        with contextlib.suppress(OSError, MemoryError, RuntimeError):
            self._opened(array, view)

    def _opened(self, array: str, view: int) -> OpenView:
        place = (array, view)
        self._used[place] = time.monotonic()
        found = self._open.get(place)
        if found is not None:
            return found
        if self._pid != os.getpid():
            self._lock, self._pid = threading.Lock(), os.getpid()
        with self._lock:
            if place not in self._open:
                shards = self._shards(array, view)
                keys = {shard.key for _, files in shards.values() for shard in files}
                self._open[place] = OpenView(
                    shards if self.cache is None else self.cache.fetch(shards),
                    self.manifest.samples,
                    resident=self.reading == "resident",
                    check=self._check(keys),
                    pinned=self.pinned,
                )
                self._verified |= keys
                same = sorted(
                    (other for other in self._open if other[0] == array), key=self._used.__getitem__
                )
                for other in same[: max(0, len(same) - self._kept_views(array))]:
                    del self._open[other]
            return self._open[place]

    def _kept_views(self, array: str) -> int:
        if self.reading != "resident":
            return OPEN_VIEWS if self.cache is None else min(OPEN_VIEWS, self.cache.views)
        return min(OPEN_VIEWS, max(2, RESIDENT_BYTES // max(1, self.view_bytes([array]))))

    def _shards(self, array: str, view: int) -> Shards:
        """Return the layout and the shard files of every component of a view."""
        found = {}
        for name, layout in self.manifest.arrays[array].components.items():
            keys = [
                shard_key(f"{array}/{name}", view, shard, layout)
                for shard in range(layout.shard_count(self.manifest.samples))
            ]
            found[name] = layout, [self._vouched(key) for key in keys]
        return found

    def _discard_damaged(self, array: str, view: int) -> bool:
        """Remove damaged files of a view from the cache; returns True if there were any."""
        if self.cache is None:
            return False
        with self._lock:
            self._open.pop((array, view), None)
            self._verified.clear()
            return self.cache.discard_damaged(self._shards(array, view))

    def _check(self, keys: set[str]) -> Check:
        if self.reading == "windowed":
            return "chunks"
        return "nothing" if self.reading == "mapped" and self._verified.issuperset(keys) else "files"

    def _vouched(self, key: str) -> ShardFile:
        if key not in self.manifest.files:
            raise StoreDamaged(
                f"the manifest of {self.address!r} does not vouch for {key!r}. "
                f"Run `precompute verify --store {self.address} --repair`, which writes damaged files again."
            )
        return ShardFile(self.location, key, *self.manifest.files[key])


def read_together(
    wanted: Sequence[tuple[StoreReader, str]], views: int | Samples, samples: Samples
) -> list[Rows]:
    """Return the rows of several arrays, of one store or of many, as `StoreReader.rows` does for each.

    One copy for all takes less time than one for each.

    Raises:
        StoreDamaged, UnknownName, StoreIncomplete, IndexError: as `StoreReader.rows`.
    """
    if isinstance(views, int) and len(wanted) > 1:
        for reader, array in wanted:
            reader._check_committed(array, views)
        # Below, each reader replaces what is damaged in its cache.
        with contextlib.suppress(StoreDamaged):
            parts = gather([reader._opened(array, views) for reader, array in wanted], samples)
            return [reader._rows_of(array, each) for (reader, array), each in zip(wanted, parts, strict=True)]
    return [reader.rows(array, views, samples) for reader, array in wanted]
