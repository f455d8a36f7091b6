"""Reading a store: rows of a committed view, copied straight from memory or from the memory map.

No asyncio, no codec pipeline, no worker processes. A view is opened once: its shard files are mapped (or
read), their sizes and checksums compared with the manifest, the address of every chunk noted. From then on
a batch is one serial copy of rows per array. Other Zarr readers give NaN for a missing file in silence: this
one refuses everything that the manifest does not vouch for.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from coursepack.data.store.layout import shard_key, table_key
from coursepack.data.store.locations import open_location
from coursepack.data.store.manifest import LABELS, STATIC
from coursepack.data.store.mapping import Check, OpenView, ShardFile
from coursepack.data.store.opening import load_manifest
from coursepack.errors import StoreDamaged, StoreIncomplete, UnknownName

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from coursepack.data.randomness import Samples
    from coursepack.data.store.layout import ArrayLayout
    from coursepack.data.store.locations.base import Location
    from coursepack.kernels import Rows

OPEN_VIEWS = 64
"""Views of an array kept open at a time; the one opened first is closed first."""
RESIDENT_BYTES = 256 << 20
"""Resident views of an array beyond this many bytes are closed, but for the one in use and the next."""

Reading = Literal["resident", "mapped", "windowed"]
"""`resident`: whole views in memory. `mapped`: memory maps, for views that fit into memory beside the rest.
`windowed`: memory maps whose chunks are checked as they are first read, for views that do not fit."""


class StoreReader:
    """A committed store, open for reading. Safe to pickle and to carry into a forked process."""

    def __init__(self, where: str | Path | Location, reading: Reading = "mapped") -> None:
        """Read the manifest.

        Args:
            where: path or address of the store.
            reading: how rows are read.

        Raises:
            StoreNotFound, StoreMismatch, StoreDamaged: as `load_manifest`.
            StoreIncomplete: no view is committed.
        """
        self.location = open_location(where)
        self.reading = reading
        self.manifest = load_manifest(self.location)
        self.views = self.manifest.committed_views(["logits"])
        if not self.views:
            raise StoreIncomplete(
                f"store {self.address!r} has committed none of its {self.manifest.views} views. "
                "Run the same `precompute run` again; it goes on where it stopped."
            )
        self.pinned = False
        self._open: dict[tuple[str, int], OpenView] = {}
        self._verified: set[str] = set()
        self._lock, self._pid = threading.Lock(), os.getpid()

    def __reduce__(self) -> tuple[type[StoreReader], tuple[Location, Reading]]:
        return StoreReader, (self.location, self.reading)

    @property
    def address(self) -> str:
        """Where the store is, as a command is given it."""
        return str(self.location)

    @property
    def path(self) -> Path:
        """The store's folder, of a store of files."""
        return Path(self.address)

    @property
    def name(self) -> str:
        """The store's name for tables and errors: the last part of its address without the ending."""
        return self.location.name.removesuffix(".zarr")

    def view_bytes(self, arrays: Iterable[str]) -> int:
        """Bytes of one view of the given arrays."""
        return self.manifest.samples * sum(self.manifest.arrays[name].row_bytes for name in arrays)

    def chunk_rows(self, arrays: Iterable[str]) -> int:
        """Rows of the longest chunk among the given arrays."""
        components = (self.manifest.arrays[name].components.values() for name in arrays)
        return max(layout.chunk_rows for layouts in components for layout in layouts)

    def labels(self) -> NDArray[np.int64]:
        """Class ids `(N,)`."""
        return self.table(LABELS)

    def static(self, name: str) -> NDArray[np.float32]:
        """What belongs to the teacher: `head_weight (C, D)`, `head_bias (C,)`, margins by their tap's name.

        Raises:
            UnknownName: the store keeps nothing of that name.
        """
        return self.table(f"{STATIC}/{name}")

    def table(self, name: str) -> NDArray[Any]:
        """An array without views, whole.

        Raises:
            UnknownName: no such table.
            StoreDamaged: its file is not what the manifest vouches for.
        """
        if name not in self.manifest.tables:
            raise UnknownName(f"table of store {self.address!r}", name, self.manifest.tables)
        table = self.manifest.tables[name]
        shards = [self._vouched(table_key(name, table.layout))]
        opened = OpenView({name: (table.layout, shards)}, table.rows, resident=True, check="files")
        return opened.gather(np.arange(table.rows))[name]

    def components(self, array: str, view: int, samples: Samples) -> dict[str, NDArray[Any]]:
        """Stored components `(n, *row_shape)` of one array for the given samples of one view.

        Raises:
            UnknownName: no such array.
            StoreIncomplete: the view is not committed for that array.
            StoreDamaged: a file is not what the manifest vouches for.
            IndexError: a sample outside the store.
        """
        if array not in self.manifest.arrays:
            raise UnknownName(f"array of store {self.address!r}", array, self.manifest.arrays)
        if view not in self.manifest.committed.get(array, ()):
            raise StoreIncomplete(
                f"view {view} of {array!r} is not committed in store {self.address!r} "
                f"(committed: {list(self.manifest.committed.get(array, ()))})"
            )
        return self._opened(array, view).gather(samples)

    def open(self, array: str, view: int) -> None:
        """Open the files of a view and check them, as the first `rows` of it would.

        Raises:
            UnknownName, StoreIncomplete, StoreDamaged: as `components`.
        """
        self.components(array, view, np.empty(0, np.int64))

    def rows(self, array: str, views: int | Samples, samples: Samples) -> Rows:
        """Encoded rows `(n, *row_shape)` of one view, or each of its own `(n,)`.

        Raises:
            StoreDamaged: also rows that the encoding cannot have written, whatever their checksums say.
            Otherwise as `components`.
        """
        if isinstance(views, int):
            parts = self.components(array, views, samples)
        else:
            parts = self._mixed(array, views, samples)
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
            name: np.empty((len(samples), *layout.row_shape), dtype=np.dtype(layout.dtype))
            for name, layout in self.manifest.arrays[array].components.items()
        }
        for view in np.unique(views):
            chosen = views == view
            for name, part in self.components(array, int(view), samples[chosen]).items():
                parts[name][chosen] = part
        return parts

    def prefetch(self, array: str, view: int) -> threading.Thread | None:
        """Open a view in the background, its checksums included; a later read waits for it if it must.

        Returns:
            The thread that does it, or None where the view is open.
        """
        if (array, view) in self._open:
            return None
        thread = threading.Thread(target=self._open_quietly, args=(array, view), daemon=True)
        thread.start()
        return thread

    def will_need(self, array: str, view: int, samples: Samples) -> None:
        """Ask the system to read these rows' chunks in the background."""
        self._opened(array, view).will_need(samples)

    def check_unchanged(self) -> None:
        """Refuse mapped files that were changed since they were opened.

        Raises:
            StoreDamaged: names the first such file.
        """
        for opened in list(self._open.values()):
            opened.check_unchanged()

    def _open_quietly(self, array: str, view: int) -> None:
        # The read that needs the view meets the same error, and reports it.
        with contextlib.suppress(OSError, MemoryError):
            self._opened(array, view)

    def _opened(self, array: str, view: int) -> OpenView:
        place = (array, view)
        found = self._open.get(place)
        if found is not None:
            return found
        if self._pid != os.getpid():
            self._lock, self._pid = threading.Lock(), os.getpid()
        with self._lock:
            if place not in self._open:
                components = {
                    name: (layout, self._shards(f"{array}/{name}", view, layout))
                    for name, layout in self.manifest.arrays[array].components.items()
                }
                keys = {shard.key for _, shards in components.values() for shard in shards}
                self._open[place] = OpenView(
                    components,
                    self.manifest.samples,
                    resident=self.reading == "resident",
                    check=self._check(keys),
                    pinned=self.pinned,
                )
                self._verified |= keys
                same = [other for other in self._open if other[0] == array]
                for other in same[: max(0, len(same) - self._kept_views(array))]:
                    del self._open[other]
            return self._open[place]

    def _kept_views(self, array: str) -> int:
        if self.reading != "resident":
            return OPEN_VIEWS
        return min(OPEN_VIEWS, max(2, RESIDENT_BYTES // max(1, self.view_bytes([array]))))

    def _shards(self, path: str, view: int, layout: ArrayLayout) -> list[ShardFile]:
        count = layout.shard_count(self.manifest.samples)
        return [self._vouched(shard_key(path, view, shard, layout)) for shard in range(count)]

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
