"""Writing of blocks: encode the teachers' outputs and write them, while the next are computed."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

import torch

from coursepack.data.store.manifest import LOGITS
from coursepack.data.store.records import KNOWN
from coursepack.kernels import teacher_stats
from coursepack.precompute.pipeline import Task, teacher_outputs

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence

    import numpy as np
    from torch import Tensor

    from coursepack.console import Meter
    from coursepack.data.loading import Renderer
    from coursepack.data.store import Block, Manifest, StoreWriter
    from coursepack.data.store.block import BlockFiles
    from coursepack.precompute.job import Job
    from coursepack.precompute.pipeline import Group, Outputs

IGNORED = -100
"""Label of a row whose class the teacher does not know."""

Written = list[tuple["BlockFiles", dict[str, float]]]
"""Unfinished files of each block of a group, and sums over the block's rows."""


def write_blocks(
    job: Job,
    writer: StoreWriter,
    renderer: Renderer,
    blocks: Sequence[Block],
    meter: Meter | None = None,
    sound: Mapping[str, tuple[int, int]] | None = None,
) -> Written:
    """Run the teacher on blocks of the same samples under one or more views, decoding each image once.

    Returns:
        The unfinished files of each block, and sums over its rows.
    """
    groups = iter([[Task(0, block) for block in blocks]])
    [(_, written)] = write_groups([job], [writer], renderer, groups, meter, sound)
    return written


def write_groups(
    jobs: Sequence[Job],
    writers: Sequence[StoreWriter],
    renderer: Renderer,
    groups: Iterator[list[Task]],
    meter: Meter | None = None,
    sound: Mapping[str, tuple[int, int]] | None = None,
) -> Generator[tuple[list[Task], Written]]:
    """Run teachers on groups of blocks, and yield each group with its files, as `write_blocks` does.

    The next blocks are computed while the files of a group are written and finished.

    Args:
        jobs: jobs of one source, view recipe and batch size.
        writers: writer of each job's store.
        renderer: renderer of the views at the sizes of all teachers.
        groups: tasks of the same samples; advanced in another thread.
        meter: progress meter.
        sound: size and crc32c of existing files; those that would not change are not rewritten.
    """
    with closing(teacher_outputs(jobs, renderer, groups)) as computed:
        current: _GroupFiles | None = None
        for outputs in computed:
            if current is None:
                current = _GroupFiles(writers, outputs.group, sound)
            current.add(outputs)
            if meter is not None:
                task = outputs.group.tasks[outputs.index]
                views = writers[task.job].manifest.views
                meter.advance(len(outputs.batch), f"view {task.block.view + 1} of {views}")
            if current.is_complete:
                yield outputs.group.tasks, current.written()
                current = None


class _GroupFiles:
    """Files of the blocks of one group."""

    def __init__(
        self, writers: Sequence[StoreWriter], group: Group, sound: Mapping[str, tuple[int, int]] | None
    ) -> None:
        self._group, self._rows_left = group, group.rows
        # The records are computed meanwhile and filled in before a block is finished.
        self._records: list[dict[str, Any]] = [{} for _ in group.tasks]
        self._files = [
            writers[task.job].write(task.block, record, sound)
            for task, record in zip(group.tasks, self._records, strict=True)
        ]
        self._sums = [_sums_of(writers[task.job].manifest) for task in group.tasks]

    def add(self, outputs: Outputs) -> None:
        """Add the next rows of one block."""
        self._files[outputs.index].add(outputs.arrays)
        self._sums[outputs.index].add(outputs.arrays[LOGITS], outputs.batch.main_labels)
        self._rows_left -= len(outputs.batch)

    @property
    def is_complete(self) -> bool:
        """True if all rows of all blocks were added."""
        return self._rows_left == 0

    def written(self) -> Written:
        """Return the files and sums of each block, after completing its record."""
        for record, found in zip(self._records, self._group.records(), strict=True):
            record.update(found)
        return [(files, sums.total) for files, sums in zip(self._files, self._sums, strict=True)]


def _sums_of(manifest: Manifest) -> Sums:
    return Sums(None if manifest.knows_all else column_of_class(manifest))


def column_of_class(manifest: Manifest) -> Tensor:
    """Return the column of the logits for each class of the source `(C,)`, `IGNORED` for an unknown class."""
    columns = torch.full((len(manifest.class_names),), IGNORED)
    columns[list(manifest.known_classes)] = torch.arange(len(manifest.known_classes))
    return columns


class Sums:
    """Sums of the teacher's statistics over the rows of a block."""

    def __init__(self, columns: Tensor | None = None) -> None:
        """Start with zeros.

        Args:
            columns: column of the logits for each class, as `column_of_class` returns it, for a teacher that
                does not know all classes. Rows with an unknown label have no part in `correct` and
                `cross_entropy`; `known` counts the others.
        """
        self.total = {"rows": 0.0, "correct": 0.0, "cross_entropy": 0.0, "entropy": 0.0}
        self._columns = columns
        if columns is not None:
            self.total[KNOWN] = 0.0

    def add(self, logits: np.ndarray, labels: Tensor) -> None:
        """Add the statistics of some rows of logits `(N, C)` with labels `(N,)`."""
        if self._columns is not None:
            labels = torch.where(labels < 0, IGNORED, self._columns[labels.clamp_min(0)])
            self.total[KNOWN] += int((labels != IGNORED).sum())
        stats = teacher_stats([torch.from_numpy(logits)], labels)
        self.total["rows"] += len(labels)
        for name in ("correct", "cross_entropy", "entropy"):
            self.total[name] += float(getattr(stats, name).double().sum())
