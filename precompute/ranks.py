"""Progress of all ranks of torchrun in one meter, read from the stores that they write."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from coursepack.console import progress
from coursepack.data.store.done import done_objects
from coursepack.data.store.layout import block_count
from coursepack.data.store.manifest import MANIFEST
from coursepack.data.store.opening import load_tagged
from coursepack.data.store.owners import live_runs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from coursepack.console import Meter
    from coursepack.data.store import Manifest, StoreWriter

SECONDS = 1.0
"""Interval in which the progress of the other ranks is read."""


class OtherParts:
    """Finished rows of the parts of a store that other processes write."""

    def __init__(self, writer: StoreWriter) -> None:
        self._location, self._part = writer.location, writer.part
        # Not the writer's manifest, which belongs to another thread.
        self._manifest: Manifest = writer.manifest
        self._tag: str | None = None

    def rows(self) -> int:
        """Return the number of finished rows, committed or with a done-object."""
        if (tag := self._location.tag(MANIFEST)) != self._tag:
            self._manifest, self._tag = load_tagged(self._location)[0], tag
        manifest = self._manifest
        blocks = block_count(manifest.samples, manifest.block_rows)
        committed = set(manifest.committed_views())
        numbers = {view * blocks + index for view in committed for index in range(blocks)}
        numbers |= {view * blocks + index for view, index in done_objects(self._location)}
        theirs = np.array([number for number in numbers if not self._part.owns(number)], dtype=np.int64)
        first = theirs % blocks * manifest.block_rows
        return int(np.minimum(manifest.block_rows, manifest.samples - first).sum())

    def are_written(self) -> bool:
        """Return True while another process writes a part of the same division."""
        own = str(self._part)
        found = ((run["part_index"], run["part_count"]) for run in live_runs(self._location))
        return any(count == self._part.count and f"{index}/{count}" != own for index, count in found)


@contextmanager
def progress_of(writers: Sequence[StoreWriter], *, quiet: bool, all_ranks: bool) -> Iterator[Meter]:
    """Show the progress of writing stores.

    Args:
        writers: writer of each store, already entered.
        quiet: show nothing.
        all_ranks: show the sum over all parts of the stores, and wait at the end until no other process is
            writing one.
    """
    title = f"precompute {', '.join(writer.location.name for writer in writers)}"
    owned, done = (
        sum(rows) for rows in zip(*((w.owned_rows(), w.done_rows()) for w in writers), strict=True)
    )
    if quiet or not all_ranks:
        with progress(title, owned, "images", done=done, shown=not quiet) as meter:
            yield meter
        return
    total = sum(writer.manifest.views * writer.manifest.samples for writer in writers)
    others = sum(OtherParts(writer).rows() for writer in writers)
    with progress(title, total, "images", done=done + others) as meter:
        ranks = _RanksMeter(meter, writers)
        yield ranks
        ranks.wait()


class _RanksMeter:
    """Meter of the batches of this rank and, every second, of the blocks that others have finished."""

    def __init__(self, meter: Meter, writers: Sequence[StoreWriter]) -> None:
        self._meter = meter
        self._parts = [OtherParts(writer) for writer in writers]
        self._rows = self._read()
        self._next = time.monotonic() + SECONDS

    def advance(self, amount: int, note: str = "") -> None:
        """Add finished images of this rank; `note` is shown beside the count."""
        self._meter.advance(amount, note)
        if time.monotonic() >= self._next:
            self._add(note)

    def wait(self) -> None:
        """Wait until no other rank is writing."""
        while any(part.are_written() for part in self._parts):
            time.sleep(SECONDS / 4)
            self._add("")
        self._add("")

    def _add(self, note: str) -> None:
        rows = self._read()
        self._meter.advance(rows - self._rows, note)
        self._rows, self._next = rows, time.monotonic() + SECONDS

    def _read(self) -> int:
        return sum(part.rows() for part in self._parts)
