"""Several teachers of the same views: each view is decoded and rendered once for all of them.

Every store has the bytes that it would have alone, because every forward pass has the same images as there.
Teachers whose stores have other blocks or batches than the rest run in a pass of their own.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

from coursepack.console import inform
from coursepack.data.loading import Renderer
from coursepack.data.store import StoreWriter
from coursepack.data.store.locations import absolute_address
from coursepack.errors import RecipeError
from coursepack.precompute.accuracy import AccuracyGuard
from coursepack.precompute.executors.local import in_turn
from coursepack.precompute.numerics import NumericsGuard
from coursepack.precompute.pipeline import Task
from coursepack.precompute.ranks import progress_of
from coursepack.precompute.write import write_groups

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from coursepack.data.store import Manifest
    from coursepack.precompute.job import Job


def run_jobs(
    jobs: Sequence[Job], *, quiet: bool = False, same_numerics: bool = False, all_ranks: bool = False
) -> list[Manifest]:
    """Write the missing blocks of several stores, as `run_job` does for one.

    Args:
        jobs: jobs of one source and view recipe, with different stores.
        quiet: show no progress.
        same_numerics: as for `run_job`.
        all_ranks: as for `run_job`.

    Returns:
        The manifest of each store at the end of the run.

    Raises:
        RecipeError: two jobs have the same store, or jobs have different views.
        CoursepackError: as `run_job`. Finished blocks of all stores are kept.
    """
    _check_together(jobs)
    writers = [StoreWriter(job.store, job.plan(), job.part, single_writer=job.single_writer) for job in jobs]
    passes: dict[tuple[int, ...], list[int]] = {}
    for index, (job, writer) in enumerate(zip(jobs, writers, strict=True)):
        key = (job.batch_size, job.views_per_load, writer.planned().block_rows)
        passes.setdefault(key, []).append(index)
    if len(passes) > 1 and not quiet:
        inform(
            f"views are rendered {len(passes)} times, because batch size, views per load or block rows of "
            "the stores differ; for new stores, the same block_rows avoids that"
        )
    found: dict[int, Manifest] = {}
    for members in passes.values():
        manifests = _run_pass(
            [jobs[i] for i in members],
            [writers[i] for i in members],
            quiet=quiet,
            same_numerics=same_numerics,
            all_ranks=all_ranks,
        )
        found |= zip(members, manifests, strict=True)
    return [found[index] for index in range(len(jobs))]


def _check_together(jobs: Sequence[Job]) -> None:
    stores = [absolute_address(job.store) for job in jobs]
    for store in stores:
        if stores.count(store) > 1:
            raise RecipeError(f"store {store!r} is named by two teachers: give each its own")
    first = jobs[0]
    for job in jobs[1:]:
        if (job.source.fingerprint, job.recipe) != (first.source.fingerprint, first.recipe):
            raise RecipeError(
                f"teachers {first.runner.network.spec!r} and {job.runner.network.spec!r} have different "
                "sources or view recipes: run them one after the other"
            )


def _run_pass(
    jobs: Sequence[Job], writers: Sequence[StoreWriter], *, quiet: bool, same_numerics: bool, all_ranks: bool
) -> list[Manifest]:
    """Run jobs whose stores have the same blocks and batches."""
    guards = [NumericsGuard(job.store, job.environment(), same_numerics) for job in jobs]
    seen = [guard.check(writer.planned()) for guard, writer in zip(guards, writers, strict=True)]
    with ExitStack() as stack:
        for writer in writers:
            stack.enter_context(writer)
            writer.commit()
        sizes = sorted({job.runner.network.preprocessing.size for job in jobs})
        first, turn = jobs[0], threading.Lock()
        with (
            progress_of(writers, quiet=quiet, all_ranks=all_ranks) as meter,
            Renderer(first.source, first.recipe, sizes, workers=first.workers, inline=True) as renderer,
        ):
            groups = in_turn(_groups(writers, first.views_per_load), turn)
            with closing(write_groups(jobs, writers, renderer, groups, meter)) as finished:
                for tasks, written in finished:
                    for files, sums in written:
                        files.finish(sums)
                    with turn:
                        whole = {task.job for task in tasks if writers[task.job].is_complete(task.block.view)}
                        for job in sorted(whole):
                            writers[job].commit()
        for each, writer, guard, before in zip(jobs, writers, guards, seen, strict=True):
            writer.commit()
            guard.check(writer.manifest, seen=before)
            AccuracyGuard(each, quiet=quiet).check(writer.manifest)
        return [writer.manifest for writer in writers]


def _groups(writers: Sequence[StoreWriter], together: int) -> Iterator[list[Task]]:
    """Yield the pending blocks of all stores in groups of the same samples under at most `together` views."""
    opened = [set(writer.open_views()) for writer in writers]
    views = sorted(set.union(*opened))
    blocks = writers[0].blocks
    for first in range(0, len(views), together):
        chosen = views[first : first + together]
        for index in range(blocks):
            tasks = [
                Task(job, block)
                for job, writer in enumerate(writers)
                for block in writer.pending(view * blocks + index for view in chosen if view in opened[job])
            ]
            if tasks:
                yield tasks
