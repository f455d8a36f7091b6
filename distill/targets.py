"""What teachers say about a batch: read from stores, or asked of the teachers live.

Both kinds have one method, `fetch(batch, teachers=None)`, and give the same answers on the same views.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from coursepack.canonical import difference_table
from coursepack.data.store import StoreReader
from coursepack.data.store.manifest import LOGITS
from coursepack.errors import StoreMismatch
from coursepack.models import TeacherRunner
from coursepack.models.build import reload_teacher

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from coursepack.data import Batch
    from coursepack.data.randomness import Samples
    from coursepack.data.store.reader import Reading
    from coursepack.kernels import Rows


@dataclass(frozen=True)
class Targets:
    """Answers of the teachers to one batch."""

    logits: list[Tensor | Rows]
    """Per teacher `(N, C)`."""


class TargetsKind(Protocol):
    """Where targets come from."""

    def fetch(self, batch: Batch, teachers: Sequence[int] | None = None) -> Targets:
        """Targets of a batch, from all teachers or from those at the given places."""

    def prefetch(self, view: int) -> None:
        """Say which view will be asked for next."""

    def will_need(self, view: int, samples: Samples) -> None:
        """Say which rows will be asked for soon."""


class CachedTargets:
    """Targets read from stores."""

    def __init__(self, readers: Sequence[StoreReader], device: torch.device) -> None:
        self.readers = list(readers)
        self.device = device

    def fetch(self, batch: Batch, teachers: Sequence[int] | None = None) -> Targets:
        """Rows of the batch's samples and views, still encoded.

        Raises:
            StoreIncomplete: a view that is not committed.
            StoreDamaged: a file is not what its manifest vouches for.
        """
        chosen = self.readers if teachers is None else [self.readers[place] for place in teachers]
        rows = [reader.rows(LOGITS, batch.view, batch.samples) for reader in chosen]
        return Targets([part.to(self.device, non_blocking=True) for part in rows])

    def prefetch(self, view: int) -> None:
        """Open the view's files in the background and check them."""
        for reader in self.readers:
            reader.prefetch(LOGITS, view)

    def will_need(self, view: int, samples: Samples) -> None:
        """Have the rows read from the disk in the background."""
        for reader in self.readers:
            reader.will_need(LOGITS, view, samples)


class OnlineTargets:
    """Targets asked of teachers that run beside the student: the baseline, and the proof."""

    def __init__(self, runners: Sequence[TeacherRunner]) -> None:
        self.runners = list(runners)

    def fetch(self, batch: Batch, teachers: Sequence[int] | None = None) -> Targets:
        """The teachers' answers to the batch's own views, rendered at each teacher's size."""
        chosen = self.runners if teachers is None else [self.runners[place] for place in teachers]
        return Targets([r.run(batch.pixels(r.network.preprocessing.size)).logits.clone() for r in chosen])

    def prefetch(self, view: int) -> None:
        """Nothing to do: live teachers answer when asked."""

    def will_need(self, view: int, samples: Samples) -> None:
        """Nothing to do: live teachers answer when asked."""


def open_stores(paths: Sequence[str | Path]) -> list[StoreReader]:
    """Open stores that belong together.

    Raises:
        StoreNotFound, StoreIncomplete, StoreDamaged: one of them cannot be read.
        StoreMismatch: they were written from different sources or views; the text shows what differs.
    """
    readers = [StoreReader(Path(path)) for path in paths]
    first = readers[0]
    for other in readers[1:]:
        if other.manifest.view_fingerprint == first.manifest.view_fingerprint:
            continue
        left, right = (
            {"view": reader.manifest.identity["view"]["recipe"], "source": reader.manifest.identity["source"]}
            for reader in (first, other)
        )
        table = difference_table(left, right, first.path.name, other.path.name)
        raise StoreMismatch(
            f"stores {str(first.path)!r} and {str(other.path)!r} do not belong together: their teachers saw "
            f"different pixels.\n{table}\nUse stores of one source and one view recipe."
        )
    return readers


def choose_reading(readers: Sequence[StoreReader], free_bytes: int) -> Reading:
    """How to read stores together, from the size of a view and the memory that is free.

    Two views of every store in half of the memory: `resident`. One in four fifths of it: `mapped`, which the
    page cache serves. More than that: `windowed`.
    """
    view_bytes = sum(reader.view_bytes([LOGITS]) for reader in readers)
    if 2 * view_bytes <= free_bytes // 2:
        return "resident"
    return "mapped" if view_bytes <= free_bytes * 4 // 5 else "windowed"


def free_memory() -> int:
    """Bytes of memory that could be used without swapping, within the limits of control group and process."""
    free = _kilobytes("/proc/meminfo", "MemAvailable") * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    for resource_limit, name in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        most = resource.getrlimit(resource_limit)[0]
        if most != resource.RLIM_INFINITY:
            free = min(free, most - _kilobytes("/proc/self/status", name) * 1024)
    return max(0, free)


def _kilobytes(file: str, name: str) -> int:
    """A number from one of the tables that Linux keeps."""
    table = dict(line.split(":", 1) for line in Path(file).read_text().splitlines())
    return int(table[name].split()[0])


def live_teachers(readers: Sequence[StoreReader], device: torch.device) -> list[TeacherRunner]:
    """The stores' teachers themselves, loaded from where their weights were when the stores were written.

    Raises:
        TeacherMismatch: the weights there are not the ones that wrote the store.
    """
    runners = []
    for reader in readers:
        manifest = reader.manifest
        teacher = manifest.identity["teacher"]
        network = reload_teacher(teacher, manifest.class_names, manifest.origin.get("weights_file"))
        runners.append(TeacherRunner(network, device=device, columns=teacher.get("columns")))
    return runners
