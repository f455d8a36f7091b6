"""What teachers say about a batch: read from stores, or asked of the teachers live.

Both kinds have one method, `fetch(batch, teachers=None)`, and give the same answers on the same views.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import psutil
import torch

from coursepack.canonical import difference_table
from coursepack.data.batches import Window
from coursepack.data.store import StoreReader
from coursepack.data.store.identity import check_complete
from coursepack.data.store.manifest import LOGITS
from coursepack.distill.finite import check_rows_finite
from coursepack.errors import NonFiniteOutput, RecipeError, StoreMismatch
from coursepack.models import TeacherRunner
from coursepack.models.load import reload_teacher
from coursepack.models.taps import tap_from_name

try:
    import resource
except ImportError:
    resource = None  # type: ignore[assignment]  # a module that Windows does not have

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from coursepack.data import Batch
    from coursepack.data.randomness import Samples
    from coursepack.data.store.reader import Reading
    from coursepack.kernels import Rows


FEATURES = "features/"
"""What the names of arrays of tapped features start with."""
WINDOW_CHUNKS = 16
WINDOW_ROWS = 8192
"""A window holds at least this many chunks and rows, so that batches are well mixed."""


@dataclass(frozen=True)
class Targets:
    """Answers of the teachers to one batch: what the objectives declared, and no more."""

    logits: list[Tensor | Rows]
    """Per teacher that was read `(N, C)`; empty where no objective reads logits."""
    features: dict[tuple[int, str], Tensor | Rows] = field(default_factory=dict)
    """`(N, ...)` by the teacher's index and the name of the tap."""
    teachers: tuple[int, ...] = ()
    """Indices of the teachers that were read; empty means all, in order."""

    @property
    def indices(self) -> tuple[int, ...]:
        """Index of the teacher of each entry of `logits`."""
        return self.teachers or tuple(range(len(self.logits)))

    def only(self, index: int) -> Targets:
        """Return the targets of one teacher."""
        return Targets([self.logits[self.indices.index(index)]], self.features, (index,))

    def features_of(self, index: int, tap: str) -> Tensor | Rows:
        """Return the features `(N, ...)` of one teacher's tap."""
        return self.features[index, tap]


class TargetSource(Protocol):
    """Where targets come from."""

    def fetch(self, batch: Batch, teachers: Sequence[int] | None = None) -> Targets:
        """Targets of a batch, from all teachers or from those at the given places."""

    def open(self, view: int, teachers: Sequence[int] | None = None) -> None:
        """Open what a view is read from, and check it, before the first batch asks for it."""

    def prefetch(self, view: int) -> None:
        """Say which view will be asked for next."""

    def will_need(self, view: int, samples: Samples) -> None:
        """Say which rows will be asked for soon."""

    def check_unchanged(self) -> None:
        """Refuse targets whose files were changed since they were opened."""

    def check_finite(self, views: Sequence[int]) -> None:
        """Refuse targets of the given views that are not finite: look for the cause of a loss that is not."""


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
        """Read some arrays of each store; None means the logits of all."""
        self.readers = list(readers)
        self.device = device
        self.arrays = [[LOGITS] for _ in readers] if arrays is None else [list(names) for names in arrays]
        self.views = views
        """Views to take in turn, where they are known."""
        self.drift = drift
        """What the stores' views are no longer, where that was allowed."""

    @functools.cached_property
    def window(self) -> Window | None:
        """How samples are to be ordered where the stores do not fit into memory."""
        if self.readers[0].reading != "windowed":
            return None
        rows = max(
            reader.chunk_rows(names) for reader, names in zip(self.readers, self.arrays, strict=True) if names
        )
        return Window(rows, max(WINDOW_CHUNKS, -(-WINDOW_ROWS // rows)))

    def fetch(self, batch: Batch, teachers: Sequence[int] | None = None) -> Targets:
        """Rows of the batch's samples and views, still encoded.

        Raises:
            StoreIncomplete: a view that is not committed.
            StoreDamaged: a file is not what its manifest vouches for.
        """
        places = range(len(self.readers)) if teachers is None else teachers
        found: dict[tuple[int, str], Tensor | Rows] = {}
        for place in places:
            for name in self.arrays[place]:
                rows = self.readers[place].rows(name, batch.view, batch.samples)
                found[place, name] = rows.to(self.device, non_blocking=True)
        return _targets(found, places)

    def open(self, view: int, teachers: Sequence[int] | None = None) -> None:
        """Open the view's files and check them, of all stores or of those at the given places.

        Raises:
            StoreIncomplete, StoreDamaged: as `fetch`.
        """
        for place in range(len(self.readers)) if teachers is None else teachers:
            for name in self.arrays[place]:
                self.readers[place].open(name, view)

    def prefetch(self, view: int) -> None:
        """Open the view's files in the background and check them."""
        for reader, names in zip(self.readers, self.arrays, strict=True):
            for name in names:
                reader.prefetch(name, view)

    def will_need(self, view: int, samples: Samples) -> None:
        """Have the rows read from the disk in the background."""
        for reader, names in zip(self.readers, self.arrays, strict=True):
            for name in names:
                reader.will_need(name, view, samples)

    def check_unchanged(self) -> None:
        """Refuse mapped files that were changed since they were opened.

        Raises:
            StoreDamaged: names the first such file.
        """
        for reader in self.readers:
            reader.check_unchanged()

    def check_finite(self, views: Sequence[int]) -> None:
        """Read all rows of some views and refuse any that holds NaN or infinity.

        Raises:
            NonFiniteOutput: names the store, the array and the first samples.
        """
        for reader, names in zip(self.readers, self.arrays, strict=True):
            for name in names:
                for view in views:
                    check_rows_finite(reader, name, view)


class OnlineTargets:
    """Targets asked of teachers that run beside the student: the baseline, and the proof."""

    def __init__(self, runners: Sequence[TeacherRunner]) -> None:
        self.runners = list(runners)
        self._finite: dict[int, Tensor] = {}
        """Per place whether all answers so far were finite; on the device, so that no step waits for it."""

    def fetch(self, batch: Batch, teachers: Sequence[int] | None = None) -> Targets:
        """The teachers' answers to the batch's own views, rendered at each teacher's size."""
        places = range(len(self.runners)) if teachers is None else teachers
        found: dict[tuple[int, str], Tensor | Rows] = {}
        for place in places:
            runner = self.runners[place]
            output = runner.run(batch.pixels(runner.network.preprocessing.size))
            found |= {(place, name): value.clone() for name, value in output.arrays().items()}
            finite = torch.stack([torch.isfinite(value).all() for value in output.arrays().values()]).all()
            self._finite[place] = finite & self._finite.get(place, finite)
        return _targets(found, places)

    def open(self, view: int, teachers: Sequence[int] | None = None) -> None:
        """Nothing to do: live teachers answer when asked."""

    def prefetch(self, view: int) -> None:
        """Nothing to do: live teachers answer when asked."""

    def will_need(self, view: int, samples: Samples) -> None:
        """Nothing to do: live teachers answer when asked."""

    def check_unchanged(self) -> None:
        """Nothing to do: live teachers have no files."""

    def check_finite(self, views: Sequence[int]) -> None:
        """Refuse teachers whose weights or answers so far were not finite.

        Raises:
            NonFiniteOutput: names the teacher.
        """
        for place, runner in enumerate(self.runners):
            runner.check_weights()
            if not bool(self._finite.get(place, True)):
                raise NonFiniteOutput(
                    f"live teacher {runner.network.spec!r} gave answers that are not finite: check its "
                    "weights and its preprocessing, or leave it out"
                )


def _targets(found: Mapping[tuple[int, str], Tensor | Rows], places: Sequence[int]) -> Targets:
    return Targets(
        [found[place, LOGITS] for place in places if (place, LOGITS) in found],
        {
            (place, name.removeprefix(FEATURES)): rows
            for (place, name), rows in found.items()
            if name.startswith(FEATURES)
        },
        tuple(places),
    )


def open_stores(paths: Sequence[str | Path]) -> list[StoreReader]:
    """Open stores that belong together.

    Raises:
        StoreNotFound, StoreIncomplete, StoreDamaged: one of them cannot be read.
        StoreMismatch: they were written from different sources or views; the text shows what differs.
    """
    readers = [StoreReader(Path(path)) for path in paths]
    for reader in readers:
        check_complete(reader.manifest, str(reader.path))
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


def common_views(
    readers: Sequence[StoreReader], arrays: Sequence[Sequence[str]], count: int | None = None
) -> tuple[int, ...]:
    """The first views, or all, that every store has committed of its logits and of what else is read of it.

    Raises:
        StoreMismatch: there are none.
        RecipeError: there are fewer than `count`.
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


def choose_reading(
    readers: Sequence[StoreReader], free_bytes: int, arrays: Sequence[Sequence[str]] | None = None
) -> Reading:
    """How to read stores together, from the size of a view and the memory that is free.

    `arrays` says what is read of each; None means the logits.

    Two views of every store in half of the memory: `resident`. One in four fifths of it: `mapped`, which the
    page cache serves. More than that: `windowed`.
    """
    arrays = [[LOGITS] for _ in readers] if arrays is None else arrays
    view_bytes = sum(reader.view_bytes(names) for reader, names in zip(readers, arrays, strict=True))
    if 2 * view_bytes <= free_bytes // 2:
        return "resident"
    return "mapped" if view_bytes <= free_bytes * 4 // 5 else "windowed"


def free_memory() -> int:
    """Bytes of memory that could be used without swapping, within the limits of control group and process."""
    free: int = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    if resource is not None:
        held = psutil.Process().memory_info()
        # macOS counts no data segment apart.
        for kind, bytes_held in (
            (resource.RLIMIT_DATA, getattr(held, "data", held.rss)),
            (resource.RLIMIT_AS, held.vms),
        ):
            most = resource.getrlimit(kind)[0]
            if most != resource.RLIM_INFINITY:
                free = min(free, most - bytes_held)
    return max(0, free)


def live_teachers(
    readers: Sequence[StoreReader],
    arrays: Sequence[Sequence[str]],
    device: torch.device,
    *,
    trust_code: bool = False,
) -> list[TeacherRunner]:
    """The stores' teachers themselves, loaded from where their weights were when the stores were written.

    Raises:
        UntrustedCode: a store names Python code for its teacher, and `trust_code` is false.
        TeacherMismatch: the weights there are not the ones that wrote the store.
    """
    runners = []
    for reader, names in zip(readers, arrays, strict=True):
        manifest = reader.manifest
        teacher = manifest.identity["teacher"]
        network = reload_teacher(
            teacher,
            manifest.class_names,
            manifest.origin.get("weights_file"),
            holder=f"store {str(reader.path)!r}",
            trust_code=trust_code,
        )
        features = [name.removeprefix(FEATURES) for name in names if name.startswith(FEATURES)]
        taps = [tap_from_name(name) for name in features]
        runners.append(TeacherRunner(network, taps, device, teacher.get("columns")))
    return runners
