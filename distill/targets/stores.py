"""Targets read from stores, which are checked to belong together."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from coursepack.canonical import difference_table
from coursepack.data.batches import Window
from coursepack.data.store import StoreReader, read_together
from coursepack.data.store.identity import check_complete
from coursepack.data.store.manifest import LOGITS
from coursepack.distill.finite import check_rows_finite
from coursepack.distill.targets.base import targets_of
from coursepack.errors import RecipeError, StoreMismatch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from torch import Tensor

    from coursepack.data import Batch
    from coursepack.data.randomness import Samples
    from coursepack.distill.targets.base import Targets
    from coursepack.kernels import Rows

WINDOW_CHUNKS = 16
WINDOW_ROWS = 8192
"""Minimum number of chunks and rows in a window, so that batches are well mixed."""


class CachedTargets:
    """Targets read from stores."""

    def __init__(
        self,
        readers: Sequence[StoreReader],
        device: torch.device,
        arrays: Sequence[Sequence[str]] | None = None,
        *,
        views: tuple[int, ...] = (),
        drift: tuple[str, ...] = (),
    ) -> None:
        """Initialize a source that reads the given arrays of each store; None means the logits."""
        self.readers = list(readers)
        self.device = device
        self.arrays = [[LOGITS] for _ in readers] if arrays is None else [list(names) for names in arrays]
        self.views = views
        """Views that all stores have committed, used in turn."""
        self.drift = drift
        """Drift detected in the stores' views and accepted with `--allow-drift`."""

    @functools.cached_property
    def window(self) -> Window | None:
        """Window within which samples are shuffled if the stores do not fit into memory; otherwise None."""
        if self.readers[0].reading != "windowed":
            return None
        rows = max(
            reader.chunk_rows(names) for reader, names in zip(self.readers, self.arrays, strict=True) if names
        )
        return Window(rows, max(WINDOW_CHUNKS, -(-WINDOW_ROWS // rows)))

    def fetch(self, batch: Batch, teachers: Sequence[int] | None = None) -> Targets:
        """Return the stored rows of the batch's samples and views, still encoded.

        Raises:
            StoreIncomplete: a view is not committed.
            StoreDamaged: a file does not match its checksum in the manifest.
        """
        indices = range(len(self.readers)) if teachers is None else teachers
        wanted = [(index, name) for index in indices for name in self.arrays[index]]
        found = read_together([(self.readers[i], name) for i, name in wanted], batch.view, batch.samples)
        arrays: dict[tuple[int, str], Tensor | Rows] = {
            place: rows.to(self.device, non_blocking=True) for place, rows in zip(wanted, found, strict=True)
        }
        return targets_of(arrays, indices)

    def open(self, view: int, teachers: Sequence[int] | None = None) -> None:
        """Open and check the files of a view, in all stores or in those with the given indices.

        Raises:
            StoreIncomplete, StoreDamaged: as `fetch`.
        """
        for reader, name in self._read(teachers):
            reader.open(name, view)

    def prefetch(self, view: int, teachers: Sequence[int] | None = None) -> None:
        """Open and check the files of a view in the background, in all stores or in some."""
        for reader, name in self._read(teachers):
            reader.prefetch(name, view)

    def will_need(self, view: int, samples: Samples, teachers: Sequence[int] | None = None) -> None:
        """Read rows of a view from disk in the background, in all stores or in some."""
        for reader, name in self._read(teachers):
            reader.will_need(name, view, samples)

    def _read(self, teachers: Sequence[int] | None) -> list[tuple[StoreReader, str]]:
        """Return the reader and the name of every array that is read of some teachers; None means all."""
        indices = range(len(self.readers)) if teachers is None else teachers
        return [(self.readers[index], name) for index in indices for name in self.arrays[index]]

    def check_unchanged(self) -> None:
        """Check that mapped files have not been changed since they were opened.

        Raises:
            StoreDamaged: a file was changed; the message names the first one.
        """
        for reader in self.readers:
            reader.check_unchanged()

    def check_finite(self, views: Sequence[int]) -> None:
        """Check all rows of some views for NaN and infinity.

        Raises:
            NonFiniteOutput: some rows are not finite; the message names store, array and first samples.
        """
        for reader, names in zip(self.readers, self.arrays, strict=True):
            for name in names:
                for view in views:
                    check_rows_finite(reader, name, view)


def open_stores(paths: Sequence[str | Path]) -> list[StoreReader]:
    """Open stores of one source and one view recipe.

    Raises:
        StoreNotFound, StoreIncomplete, StoreDamaged: a store cannot be read.
        StoreMismatch: sources or view recipes differ; the message shows the differences.
    """
    readers = [StoreReader(path) for path in paths]
    for reader in readers:
        check_complete(reader.manifest, reader.address)
    first = readers[0]
    for other in readers[1:]:
        if other.manifest.view_fingerprint == first.manifest.view_fingerprint:
            continue
        left, right = (
            {"view": reader.manifest.identity["view"]["recipe"], "source": reader.manifest.identity["source"]}
            for reader in (first, other)
        )
        table = difference_table(left, right, first.location.name, other.location.name)
        raise StoreMismatch(
            f"stores {first.address!r} and {other.address!r} do not belong together: their teachers saw "
            f"different pixels.\n{table}\nUse stores of one source and one view recipe."
        )
    return readers


def common_views(
    readers: Sequence[StoreReader], arrays: Sequence[Sequence[str]], count: int | None = None
) -> tuple[int, ...]:
    """Return the views that every store has committed for its logits and for all arrays that are read.

    Args:
        readers: the stores.
        arrays: names of the arrays to read from each store.
        count: number of views to return; None means all.

    Raises:
        StoreMismatch: the stores have no view in common.
        RecipeError: the stores have fewer than `count` views in common.
    """
    committed = [
        set(reader.manifest.committed_views(list(dict.fromkeys([LOGITS, *names]))))
        for reader, names in zip(readers, arrays, strict=True)
    ]
    common = sorted(set.intersection(*committed))
    if not common:
        raise StoreMismatch("the stores have no committed view in common: finish them with `precompute run`")
    if count is not None and count > len(common):
        raise RecipeError(
            f"views is {count}, but the stores have {len(common)} views in common: leave --views out, "
            f"or add views with `precompute run ... --views {count}`"
        )
    return tuple(common[:count])
