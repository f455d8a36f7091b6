"""Verification of a store against its source and its teacher, and repair of damaged files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from coursepack.console import SHORT_SECONDS, progress, warn
from coursepack.data.drift import changed_content, drift
from coursepack.data.randomness import below, random_words
from coursepack.data.sources import open_stored
from coursepack.data.store import StoreReader, StoreWriter
from coursepack.data.store.layout import table_key
from coursepack.data.store.locations import open_location
from coursepack.data.store.manifest import LABELS, LOGITS
from coursepack.data.views import draw, render, stored_view
from coursepack.data.views.recorded import parameters_of_store
from coursepack.errors import CoursepackError, StoreMismatch, UntrustedCode
from coursepack.imports import check_trusted
from coursepack.models import TeacherRunner
from coursepack.models.load import reload_teacher
from coursepack.models.precision import has_precision
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

SLACK = {"float32": 1e-4, "tf32": 1e-2, "float16": 1e-2, "bfloat16": 1e-1}
"""Tolerance for differences by batch size, threads and device, relative to a teacher's largest output, by
precision of the store."""
BATCH_SIZE = 256
"""Images per forward pass for a store that records no batch size."""


@dataclass(frozen=True)
class DeepReport:
    """Result of running the teacher again on some rows of a store."""

    rows: int
    """Number of compared rows (sample, view), with all arrays of each."""
    wrong: tuple[str, ...]
    """Array, sample and view of each row that differs by more than its encoding and `SLACK` allow."""


def job_of_store(
    path: str | Path,
    manifest: Manifest,
    *,
    weights: str | None,
    root: Path | None,
    device: torch.device,
    trust_code: bool = False,
    float32_instead: bool = False,
    single_writer: bool = False,
) -> Job:
    """Recreate the job that wrote a store from the store's manifest.

    Args:
        path: folder or address of the store.
        manifest: manifest of the store.
        weights: file or name of the teacher's weights. Defaults to the recorded one.
        root: folder of the source's files. Defaults to the recorded one.
        device: device that the teacher runs on.
        trust_code: import and run Python code that the manifest names.
        single_writer: no other process writes to the store.
        float32_instead: run the teacher in float32 if the device does not have the store's precision.

    Raises:
        UntrustedCode: the manifest names Python code, and `trust_code` is false.
        StoreMismatch: the source differs from the one that the store was written from.
        TeacherMismatch, RecipeError: the teacher's weights are missing or differ from the store's, or the
            device does not have its precision.
    """
    identity = manifest.identity
    holder = f"store {str(path)!r}"
    source = source_of_stores([manifest], root, holder=holder, trust_code=trust_code)
    teacher = identity["teacher"]
    weights = weights or manifest.origin.get("weights_file")
    network = reload_teacher(teacher, manifest.class_names, weights, holder=holder, trust_code=trust_code)
    taps = [tap_from_name(name.removeprefix("features/")) for name in manifest.arrays if name != LOGITS]
    environments = manifest.environments
    settings = environments[0] if environments else {}
    precision = identity.get("precision", "float32")
    if float32_instead and not has_precision(precision, device):
        precision = "float32"
    runner = TeacherRunner(
        network,
        taps,
        device,
        teacher.get("columns"),
        precision=precision,
        channels_last=settings.get("memory_layout") == "channels_last",
        compiled=settings.get("compile") is True,
    )
    return Job(
        store=path,
        source=source,
        recipe=stored_view(identity["view"]["recipe"], holder, trust_code=trust_code),
        runner=runner,
        views=manifest.views,
        batch_size=settings.get("batch_size", BATCH_SIZE),
        single_writer=single_writer,
    )


def check_same_pixels(manifests: Sequence[Manifest]) -> None:
    """Check that stores were written from the same source under the same view recipe.

    Raises:
        StoreMismatch: they were not.
    """
    if len({manifest.view_fingerprint for manifest in manifests}) > 1:
        raise StoreMismatch(
            "the stores were written from different pixels: give stores of one source and view recipe"
        )


def source_of_stores(
    manifests: Sequence[Manifest],
    root: Path | None,
    *,
    holder: str = "the store",
    trust_code: bool = False,
) -> Source:
    """Open the source that stores were written from.

    Args:
        manifests: manifests of the stores, all of one source and one view recipe.
        root: folder of the source's files. Defaults to the one that the first store records.
        holder: name of the first store, for error messages.
        trust_code: import and run Python code that the first manifest names.

    Raises:
        UntrustedCode: the first manifest names Python code for the source, and `trust_code` is false.
        StoreMismatch: the stores were written from different pixels, or from another source.
        SourceError, RecipeError: the source cannot be opened.
    """
    check_same_pixels(manifests)
    first = manifests[0].identity
    name = check_trusted(first["source"]["name"], holder, trust_code=trust_code)
    source = open_stored(name, root, manifests[0].source_root)
    if source.fingerprint != first["source"]["fingerprint"]:
        raise StoreMismatch(
            f"source {source.name!r} has fingerprint {source.fingerprint[:12]}, but the store was written "
            f"from {first['source']['fingerprint'][:12]}: give the --root of the store's source"
        )
    return source


def check_views(
    path: str | Path,
    manifest: Manifest,
    root: Path | None,
    *,
    content: bool = False,
    trust_code: bool = False,
) -> tuple[str, ...]:
    """Check that this version of coursepack renders the views that a store was written from.

    If the source cannot be opened or is not trusted, the check is skipped with a message on stderr, unless
    `content` is true.

    Args:
        path: folder or address of the store.
        manifest: manifest of the store.
        root: folder of the source's files. Defaults to the recorded one.
        content: also read every file of the source and compare it with the recorded checksums.
        trust_code: import and run Python code that the manifest names for source or views.

    Returns:
        One line per block or sample that differs.

    Raises:
        UntrustedCode: `content` is true, and the manifest names Python code that is not trusted.
        SourceError, RecipeError: `content` is true, and the source cannot be opened.
    """
    identity = manifest.identity
    try:
        name = check_trusted(identity["source"]["name"], "the store", trust_code=trust_code)
        recipe = stored_view(identity["view"]["recipe"], "the store", trust_code=trust_code).located(
            str(path)
        )
        source = open_stored(name, root, manifest.source_root)
    except UntrustedCode as error:
        if content:
            raise
        warn(f"the views are not checked: {error}")
        return ()
    except CoursepackError as error:
        if content:
            raise
        warn(f"the views are not checked, because their source cannot be opened: {error}")
        return ()
    if source.fingerprint != identity["source"]["fingerprint"]:
        return (f"source {source.name!r} differs from the one that the store was written from",)
    views = [int(view) for view in manifest.view_records]
    found: tuple[str, ...] = ()
    with progress("check the views", len(views), "views", delay=SHORT_SECONDS) as meter:
        for view in sorted(views):
            found += drift(manifest, source, recipe, [view], every_block=True)
            meter.advance(1)
    if recipe.recorded is not None and len(views) == manifest.views:
        parameters = parameters_of_store(StoreReader(path), sorted(views))
        if parameters != recipe.recorded.parameters:
            found += (f"the recorded views ({parameters[:12]}) are not those of the fingerprint",)
    if content and "content" not in manifest.view_records.get("0", {}):
        warn("the store has no checksums of its source's content, so the content is not compared")
    if not content:
        return found
    with progress("compare the source", manifest.samples, "samples", delay=SHORT_SECONDS) as meter:
        return found + changed_content(manifest, source, _begun(path, manifest), on_samples=meter.advance)


def _begun(path: str | Path, manifest: Manifest) -> float:
    """Return the time when a store was begun: that of its labels, which are written once."""
    return open_location(path).modified(table_key(LABELS, manifest.tables[LABELS].layout))


def verify_deep(job: Job, rows: int, *, on_rows: Callable[[int], None] | None = None) -> DeepReport:
    """Run the teacher again on random rows of the committed views and compare its outputs with the store.

    Args:
        job: job from `job_of_store`.
        rows: number of rows (sample, view), drawn with a fixed seed.
        on_rows: called after each batch with its number of rows, to show progress.
    """
    reader = StoreReader(job.store)
    slack = SLACK[reader.manifest.identity.get("precision", "float32")]
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
            outputs = job.runner.run(pixels).arrays()
            for name, array in reader.manifest.arrays.items():
                if view not in reader.manifest.committed.get(name, ()):
                    continue
                stored = reader.components(name, int(view), part)
                agrees = array.encoding.agrees(outputs[name].cpu().numpy(), stored, slack)
                wrong += [f"{name}: sample {sample}, view {view}" for sample in part[~agrees]]
            if on_rows is not None:
                on_rows(len(part))
    return DeepReport(rows, tuple(wrong))


def repair(job: Job, problems: Iterable[Problem]) -> tuple[str, ...]:
    """Write damaged files again, and the other files of their blocks if their content changes by that.

    Files of committed views that the manifest does not list are written and listed. A machine with other
    numerics than the store's causes a warning.

    Args:
        job: job from `job_of_store`.
        problems: damaged, missing or unlisted files, as `data.store.verify` reports them.

    Returns:
        Keys of the files whose content differs from before, because another machine rounds differently. The
        manifest has their new checksums.

    Raises:
        StoreBusy: another process is writing to the store.
        StoreDamaged: something other than a file is at the path of a file and cannot be replaced safely.
    """
    problems = list(problems)
    keys = {problem.key for problem in problems}
    # Views whose lists are damaged are written from the start, because their files are not known.
    lost = sorted(problem.view for problem in problems if problem.view is not None)
    writing = StoreWriter(job.store, _same_arrays(job), single_writer=job.single_writer)
    with writing as writer, job.renderer() as renderer:
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
            # A shard of an array, whether or not the manifest lists it; other problems are tables.
            if name in writer.manifest.arrays and file.startswith("c."):
                view, shard = (int(number) for number in file.split(".")[1:3])
                layout = writer.manifest.arrays[name].components[component]
                index = shard * layout.shard_rows // writer.manifest.block_rows
                blocks.setdefault((view, index), set()).add(name)
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
    """Return the job's plan with the arrays and encodings of the existing store."""
    plan = job.plan()
    manifest = StoreReader(job.store).manifest
    arrays = {name: (array.encoding, array.row_shape) for name, array in manifest.arrays.items()}
    return replace(plan, arrays=arrays, origin=manifest.origin)
