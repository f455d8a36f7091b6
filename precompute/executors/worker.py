"""Worker process of a cluster: recreates a job from its specification and writes blocks of its store."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from coursepack.data.store import StoreWriter
from coursepack.errors import CoursepackError, WorkerLost
from coursepack.precompute.write import write_blocks
from coursepack.ray_workers import enter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coursepack.data.loading import Renderer
    from coursepack.data.store import Block
    from coursepack.data.store.locations.base import Location
    from coursepack.precompute.job import Job
    from coursepack.precompute.spec import PrecomputeSpec


@dataclass(frozen=True)
class Witness:
    """Object that a driver puts into its store, to be found by workers that have the same store."""

    key: str
    content: bytes

    def is_in(self, location: Location) -> bool:
        """Return whether a location has the object."""
        try:
            return location.get(self.key, len(self.content)) == self.content
        except (FileNotFoundError, ValueError):
            return False


@dataclass(frozen=True)
class Report:
    """Result of `Worker.start`."""

    name: str
    """Host and process id."""
    identity: dict[str, Any] = field(default_factory=dict)
    """Identity of the store that the worker would write: teacher, view, source and precision."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Environment that the worker records with its blocks."""
    error: str | None = None
    """Message of the error for which it could not open the job."""


class Worker:
    """Keeps the teacher and the renderer of a worker process from one block to the next."""

    def __init__(self) -> None:
        self._job: Job
        self._renderer: Renderer
        self._writer: StoreWriter | None = None

    def start(self, spec: PrecomputeSpec, folder: str, sharing: int) -> Report:
        """Open the source and load the teacher.

        Args:
            spec: specification of the job.
            folder: working directory of the driver, as for `enter`.
            sharing: number of workers that share the cores of this machine.
        """
        name = enter(folder, sharing)
        try:
            self._job = spec.job()
            return Report(name, self._job.plan().identity, self._job.environment())
        except (CoursepackError, OSError) as error:
            return Report(name, error=str(error))

    def write(self, blocks: Sequence[Block], witness: Witness) -> None:
        """Compute blocks of the same samples, and write their files and done-objects.

        Args:
            blocks: blocks to compute.
            witness: object that the driver has put into the store.

        Raises:
            WorkerLost: the store of this process is not that of the driver.
            CoursepackError: as `write_blocks`.
        """
        if self._writer is None:
            self._writer = self._open_store(witness)
            self._renderer = self._job.renderer()
        for files, sums in write_blocks(self._job, self._writer, self._renderer, blocks):
            files.finish(sums)

    def _open_store(self, witness: Witness) -> StoreWriter:
        """Return a writer that owns no part, because the driver owns it."""
        writer = StoreWriter(self._job.store, self._job.plan(), self._job.part)
        if not witness.is_in(writer.location):
            raise WorkerLost(
                f"store {str(self._job.store)!r} on {socket.gethostname()} is not the store that this "
                "command writes: give a --store on a file system that all nodes share"
            )
        writer.manifest = writer.planned()
        return writer
