"""Reading a store: rows of a committed view, copied straight from the memory map.

No asyncio, no codec pipeline, no worker processes. A view is opened by mapping its shard files, checking
their sizes and checksums against the manifest, and noting the address of every chunk; from then on a batch
is one serial copy of rows per array. Other Zarr readers give NaN for a missing file in silence: this one
refuses everything that the manifest does not vouch for.
"""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coursepack.data.store.layout import shard_key
from coursepack.data.store.manifest import LABELS, load_manifest
from coursepack.data.store.shards import chunk_offsets, file_checksum
from coursepack.errors import StoreDamaged, StoreIncomplete, UnknownName

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from coursepack.data.randomness import Samples
    from coursepack.data.store.layout import ArrayLayout
    from coursepack.kernels import Rows

OPEN_VIEWS = 8
"""Views of components kept mapped at a time; the least recently read is unmapped first."""


class StoreReader:
    """A committed store, open for reading. Safe to pickle and to carry into a forked process."""

    def __init__(self, path: str | Path) -> None:
        """Read the manifest.

        Raises:
            StoreNotFound, StoreMismatch, StoreDamaged: as `load_manifest`.
            StoreIncomplete: no view is committed.
        """
        self.path = Path(path)
        self.manifest = load_manifest(self.path)
        self.views = self.manifest.committed_views(["logits"])
        if not self.views:
            raise StoreIncomplete(
                f"store {str(path)!r} has committed none of its {self.manifest.views} views. "
                "Run the same `precompute run` again; it goes on where it stopped."
            )
        self._open: OrderedDict[tuple[str, str, int], _MappedView] = OrderedDict()

    def __reduce__(self) -> tuple[type[StoreReader], tuple[Path]]:
        return StoreReader, (self.path,)

    @property
    def name(self) -> str:
        """The store's name for tables and errors: its folder without the ending."""
        return self.path.name.removesuffix(".zarr")

    def labels(self) -> NDArray[np.int64]:
        """Class ids `(N,)`."""
        layout, key = self.manifest.labels, f"{LABELS}/c.0"
        view = _map_shards(self, [key], layout)
        samples = np.arange(self.manifest.samples)
        return _gather(view, layout, samples).view(np.int64)[:, 0]

    def components(self, array: str, view: int, samples: Samples) -> dict[str, NDArray[Any]]:
        """Stored components `(n, *row_shape)` of one array for the given samples of one view.

        Raises:
            UnknownName: no such array.
            StoreIncomplete: the view is not committed for that array.
            StoreDamaged: a file is not what the manifest vouches for.
            IndexError: a sample outside the store.
        """
        if array not in self.manifest.arrays:
            raise UnknownName(f"array of store {str(self.path)!r}", array, self.manifest.arrays)
        if view not in self.manifest.committed.get(array, ()):
            raise StoreIncomplete(
                f"view {view} of {array!r} is not committed in store {str(self.path)!r} "
                f"(committed: {list(self.manifest.committed.get(array, ()))})"
            )
        samples = np.ascontiguousarray(samples, dtype=np.int64)
        if len(samples) and not 0 <= samples.min() <= samples.max() < self.manifest.samples:
            raise IndexError(
                f"samples {samples.min()} to {samples.max()} were asked of store {str(self.path)!r}, "
                f"which has 0 to {self.manifest.samples - 1}"
            )
        out = {}
        for component, layout in self.manifest.arrays[array].components.items():
            mapped = self._mapped(array, component, view, layout)
            raw = _gather(mapped, layout, samples)
            out[component] = raw.view(np.dtype(layout.dtype)).reshape(len(samples), *layout.row_shape)
        return out

    def rows(self, array: str, views: Samples, samples: Samples) -> Rows:
        """Encoded rows `(n, *row_shape)`, each of its own view `(n,)`; errors as `components`."""
        distinct = np.unique(views)
        if len(distinct) == 1:
            parts = self.components(array, int(distinct[0]), samples)
        else:
            parts = {
                name: np.empty((len(samples), *layout.row_shape), dtype=np.dtype(layout.dtype))
                for name, layout in self.manifest.arrays[array].components.items()
            }
            for view in distinct:
                chosen = views == view
                for name, part in self.components(array, int(view), samples[chosen]).items():
                    parts[name][chosen] = part
        encoding = self.manifest.arrays[array].encoding
        return encoding.rows({name: torch.from_numpy(part) for name, part in parts.items()})

    def _mapped(self, array: str, component: str, view: int, layout: ArrayLayout) -> _MappedView:
        place = (array, component, view)
        if place not in self._open:
            count = layout.shard_count(self.manifest.samples)
            keys = [shard_key(f"{array}/{component}", view, shard, layout) for shard in range(count)]
            self._open[place] = _map_shards(self, keys, layout)
            while len(self._open) > OPEN_VIEWS:
                self._open.popitem(last=False)
        self._open.move_to_end(place)
        return self._open[place]


@dataclass(frozen=True)
class _MappedView:
    """The shards of one component and view, mapped and checked."""

    files: list[NDArray[np.uint8]]
    """Kept so that the maps stay."""
    chunks: NDArray[np.int64]
    """Address of the first row of every chunk."""


def _map_shards(reader: StoreReader, keys: list[str], layout: ArrayLayout) -> _MappedView:
    files, addresses = [], []
    rows_left = reader.manifest.samples
    for key in keys:
        file = _map_file(reader, key, layout)
        offsets = chunk_offsets(file, min(layout.shard_rows, rows_left), layout, key)
        files.append(file)
        addresses.append(offsets + file.ctypes.data)
        rows_left -= layout.shard_rows
    return _MappedView(files, np.concatenate(addresses))


def _map_file(reader: StoreReader, key: str, layout: ArrayLayout) -> NDArray[np.uint8]:
    """Map a file whose size and checksum are what the manifest says."""
    path = reader.path / key
    advice = f"Run `precompute verify --store {reader.path}`."
    if key not in reader.manifest.files:
        raise StoreDamaged(f"the manifest of {str(reader.path)!r} does not vouch for {key!r}. {advice}")
    size, crc = reader.manifest.files[key]
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                raise StoreDamaged(f"{str(path)!r} has {found} bytes, expected {size}. {advice}")
            content = np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), dtype=np.uint8)
    except FileNotFoundError as error:
        raise StoreDamaged(f"{str(path)!r} is missing. {advice}") from error
    if file_checksum(content, layout) != crc:
        raise StoreDamaged(f"the content of {str(path)!r} does not match its checksum. {advice}")
    return content


def _gather(view: _MappedView, layout: ArrayLayout, samples: Samples) -> NDArray[np.uint8]:
    """Raw rows `(n, row_bytes)`."""
    from coursepack.data.store.jit_gather import gather_rows

    out = np.empty((len(samples), layout.row_bytes), dtype=np.uint8)
    gather_rows(view.chunks, layout.chunk_rows, layout.row_bytes, samples, out.ctypes.data)
    return out
