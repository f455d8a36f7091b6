"""Does a store still hold what its teacher says? And if not, write that part again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from coursepack.console import say
from coursepack.data.drift import changed_content, drift
from coursepack.data.randomness import below, random_words
from coursepack.data.sources import open_stored
from coursepack.data.store import StoreReader, StoreWriter
from coursepack.data.store.layout import table_key
from coursepack.data.store.manifest import LABELS, LOGITS
from coursepack.data.views import draw, render, stored_view
from coursepack.errors import CoursepackError, StoreMismatch, UntrustedCode
from coursepack.imports import check_trusted
from coursepack.models import TeacherRunner
from coursepack.models.build import reload_teacher
from coursepack.models.taps import tap_from_name
from coursepack.precompute.job import Job
from coursepack.precompute.numerics import NumericsGuard
from coursepack.precompute.write import write_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from coursepack.data import Source
    from coursepack.data.store import Manifest, StorePlan
    from coursepack.data.store.check import Problem

SLACK = 1e-4
"""How far a teacher's answer may move with batch size and threads, as a share of its largest value."""
BATCH_SIZE = 256


@dataclass(frozen=True)
class DeepReport:
    """What running the teacher again showed."""

    rows: int
    """Rows (sample, view) compared, all arrays of each."""
    wrong: tuple[str, ...]
    """Rows that differ by more than their encoding allows."""


def job_of_store(
    path: Path,
    manifest: Manifest,
    *,
    weights: str | None,
    root: Path | None,
    device: torch.device,
    trust_code: bool = False,
) -> Job:
    """The job that wrote a store, from its manifest.

    Raises:
        UntrustedCode: the manifest names Python code, and `trust_code` is false.
        StoreMismatch: the source is not the one that the teacher saw.
        TeacherMismatch, RecipeError: the teacher's weights are not where they were, or are others.
    """
    identity = manifest.identity
    holder = f"store {str(path)!r}"
    source = source_of_stores([manifest], root, holder=holder, trust_code=trust_code)
    teacher = identity["teacher"]
    weights = weights or manifest.origin.get("weights_file")
    network = reload_teacher(teacher, manifest.class_names, weights, holder=holder, trust_code=trust_code)
    taps = [tap_from_name(name.removeprefix("features/")) for name in manifest.arrays if name != LOGITS]
    runner = TeacherRunner(network, taps, device, teacher.get("columns"))
    environments = manifest.environments
    return Job(
        store=path,
        source=source,
        recipe=stored_view(identity["view"]["recipe"], holder, trust_code=trust_code),
        runner=runner,
        views=manifest.views,
        batch_size=environments[0]["batch_size"] if environments else BATCH_SIZE,
    )


def source_of_stores(
    manifests: Sequence[Manifest],
    root: Path | None,
    *,
    holder: str = "the store",
    trust_code: bool = False,
) -> Source:
    """What the teachers of stores saw.

    Raises:
        UntrustedCode: the first manifest names Python code for it, and `trust_code` is false.
        StoreMismatch: they saw different pixels, or the source at hand is another.
        SourceError, RecipeError: it cannot be opened.
    """
    first = manifests[0].identity
    if len({manifest.view_fingerprint for manifest in manifests}) > 1:
        raise StoreMismatch("the stores' teachers saw different pixels: give stores of one source and view")
    name = check_trusted(first["source"]["name"], holder, trust_code=trust_code)
    source = open_stored(name, root, manifests[0].source_root)
    if source.fingerprint != first["source"]["fingerprint"]:
        raise StoreMismatch(
            f"source {source.name!r} is {source.fingerprint[:12]} here, but the teacher saw "
            f"{first['source']['fingerprint'][:12]}: give the --root that the teacher saw"
        )
    return source


def check_views(
    path: Path,
    manifest: Manifest,
    root: Path | None,
    *,
    content: bool = False,
    trust_code: bool = False,
) -> tuple[str, ...]:
    """Whether this version draws and renders the views that the store's teacher saw.

    Args:
        path: the store.
        manifest: the store's.
        root: folder of the source's files; None means where they were.
        content: also read every file of the source and compare it with what was seen.
        trust_code: draw the views even if the manifest names Python code for source or views.

    Returns:
        One line per block or sample that differs. A source that is not at hand or not trusted is said, and
        only an error if its content was asked for.

    Raises:
        UntrustedCode: `content`, and the manifest names Python code that is not trusted.
        SourceError, RecipeError: `content`, and the source cannot be opened.
    """
    identity = manifest.identity
    try:
        name = check_trusted(identity["source"]["name"], "the store", trust_code=trust_code)
        recipe = stored_view(identity["view"]["recipe"], "the store", trust_code=trust_code)
        source = open_stored(name, root, manifest.source_root)
    except UntrustedCode as error:
        if content:
            raise
        say(f"views are not drawn again: {error}")
        return ()
    except CoursepackError as error:
        if content:
            raise
        say(f"views are not drawn again, because their source is not at hand: {error}")
        return ()
    if source.fingerprint != identity["source"]["fingerprint"]:
        return (f"source {source.name!r} here is not the one that the teacher saw",)
    views = [int(view) for view in manifest.view_records]
    found = drift(manifest, source, recipe, views, every_block=True)
    if content and "content" not in manifest.view_records.get("0", {}):
        say("the store keeps no checksums of its source's content, so that was not compared")
    return found + (changed_content(manifest, source, _begun(path, manifest)) if content else ())


def _begun(path: Path, manifest: Manifest) -> float:
    """When a store was begun, as its file system has it: the labels are written once."""
    return (path / table_key(LABELS, manifest.tables[LABELS].layout)).stat().st_mtime


def verify_deep(job: Job, rows: int, *, on_rows: Callable[[int], None] | None = None) -> DeepReport:
    """Run the teacher again on some rows of every committed view and compare with what is stored.

    Args:
        job: from `job_of_store`.
        rows: how many rows (sample, view) in all, drawn at random but the same each time.
        on_rows: called with the number of rows after each batch, for progress.
    """
    reader = StoreReader(job.store)
    numbers = np.arange(rows)
    words = random_words(0, numbers, 0, 0)
    samples = below(words[:, 0], reader.manifest.samples)
    views = np.asarray(reader.views)[below(words[:, 1], len(reader.views))]
    size = job.runner.network.preprocessing.size
    wrong = []
    for view in np.unique(views):
        chosen = samples[views == view]
        for start in range(0, len(chosen), job.batch_size):
            part = chosen[start : start + job.batch_size]
            pixels = torch.from_numpy(
                render(job.recipe, job.source, part, draw(job.recipe, job.source, part, int(view)), size)
            )
            answers = job.runner.run(pixels).arrays()
            for name, array in reader.manifest.arrays.items():
                if view not in reader.manifest.committed.get(name, ()):
                    continue
                stored = reader.components(name, int(view), part)
                agrees = array.encoding.agrees(answers[name].cpu().numpy(), stored, SLACK)
                wrong += [f"{name}: sample {sample}, view {view}" for sample in part[~agrees]]
            if on_rows is not None:
                on_rows(len(part))
    return DeepReport(rows, tuple(wrong))


def repair(job: Job, problems: Iterable[Problem]) -> tuple[str, ...]:
    """Write the files with problems again, and of their blocks whatever comes out otherwise than it stands.

    Files of committed views that the manifest does not name are among them: it vouches for them afterwards. A
    machine of other numerics than the store's is warned of.

    Returns:
        The files whose new content has another checksum than before (another machine rounds differently); the
        manifest vouches for the new ones.

    Raises:
        StoreBusy: a live process writes to the store.
        StoreDamaged: in the place of a file is something that may be worth keeping.
    """
    problems = list(problems)
    keys = {problem.key for problem in problems}
    # Views whose lists are damaged are written as if they had not been: nothing says what their files were.
    lost = sorted(problem.view for problem in problems if problem.view is not None)
    with StoreWriter(job.store, _same_arrays(job)) as writer, job.renderer() as renderer:
        writer.location.make_way(keys)
        NumericsGuard(job.store, job.environment()).check(writer.manifest)
        if lost:
            writer.forget(lost)
        before = writer.manifest.files
        sound = {key: value for key, value in before.items() if key not in keys}
        after = writer.repair_tables(keys)
        blocks: dict[tuple[int, int], set[str]] = {}
        for key in keys:
            path, _, file = key.rpartition("/")
            name, _, component = path.rpartition("/")
            # Also a shard that the manifest fails to name; what else `verify` reports is no shard.
            if name in writer.manifest.arrays and file.startswith("c."):
                view, shard = (int(number) for number in file.split(".")[1:3])
                layout = writer.manifest.arrays[name].components[component]
                place = (view, shard * layout.shard_rows // writer.manifest.block_rows)
                blocks.setdefault(place, set()).add(name)
        for (view, index), names in sorted(blocks.items()):
            block = writer.block(view, index, tuple(sorted(names)))
            [(written, _)] = write_blocks(job, writer, renderer, [block], sound=sound)
            after |= written.flush()
        writer.replace_files(after)
        numbers = (view * writer.blocks + index for view in lost for index in range(writer.blocks))
        for block in writer.pending(numbers):
            [(written, sums)] = write_blocks(job, writer, renderer, [block])
            written.finish(sums)
        writer.commit()
        return tuple(sorted(key for key, value in after.items() if before.get(key, value) != value))


def _same_arrays(job: Job) -> StorePlan:
    """The job's plan with the encodings that the store has."""
    plan = job.plan()
    manifest = StoreReader(job.store).manifest
    arrays = {name: (array.encoding, array.row_shape) for name, array in manifest.arrays.items()}
    return replace(plan, arrays=arrays, origin=manifest.origin)
