"""Teachers' stores, opened and checked together with the source and view recipe they were written from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from coursepack.canonical import difference_table
from coursepack.data import view_fingerprint
from coursepack.data.drift import MadeViews, drift
from coursepack.data.sources import open_stored
from coursepack.data.sources.roots import summarize_names
from coursepack.data.store import StoreReader
from coursepack.data.store.cache import open_caches
from coursepack.data.store.manifest import FEATURES, LABELS, LOGITS
from coursepack.data.views import stored_view
from coursepack.distill.targets.reading import choose_reading, free_memory
from coursepack.distill.targets.stores import CachedTargets, common_views, open_stores
from coursepack.errors import RecipeError, StoreMismatch, TeacherMismatch
from coursepack.imports import check_trusted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from coursepack.data import Source, ViewRecipe
    from coursepack.data.store.reader import Reading
    from coursepack.distill.objective import Objective


@dataclass(frozen=True)
class TeacherStores:
    """Stores of one source and view recipe, together with these."""

    source: Source
    view: ViewRecipe
    readers: tuple[StoreReader, ...]
    """Reader of each store, in the given order."""
    root: str | None = None
    """Folder of the source's files, if it has any."""


def open_teacher_stores(
    stores: Sequence[str | Path],
    *,
    source: Source | None = None,
    view: ViewRecipe | None = None,
    root: str | None = None,
    trust_code: bool = False,
) -> TeacherStores:
    """Open stores with the source and the view recipe that they were written from.

    Args:
        stores: paths, one per teacher.
        source: an opened source; defaults to the source named in the stores.
        view: view recipe; defaults to that of the stores.
        root: folder of the source's files; defaults to the folder recorded in the stores.
        trust_code: allow stores to name Python code for their source and views.

    Raises:
        RecipeError: no store is given.
        UntrustedCode: a store names Python code, and `trust_code` is false.
        StoreNotFound, StoreIncomplete, StoreDamaged: a store cannot be read.
        StoreMismatch: stores, source and view recipe do not match.
        TeacherMismatch: a teacher has other classes than the source.
        SourceError: files of the source are missing or damaged.
    """
    if not stores:
        raise RecipeError("there is no store to learn from: give at least one")
    readers = open_stores(stores)
    identity, holder = readers[0].manifest.identity, f"store {readers[0].address!r}"
    kept = readers[0].manifest.source_root
    if source is None:
        name = check_trusted(identity["source"]["name"], holder, trust_code=trust_code)
        source = open_stored(name, None if root is None else Path(root), kept)
    source.check()
    if view is None:
        view = stored_view(identity["view"]["recipe"], holder, trust_code=trust_code)
    for reader in readers:
        check_store(reader, source, view)
    view = view.located(readers[0].address)
    return TeacherStores(source, view, tuple(readers), kept if root is None else root)


def make_targets(
    stores: TeacherStores,
    *objectives: Objective,
    views: int | None = None,
    device: torch.device | None = None,
    reading: Reading | Literal["auto"] = "auto",
    allow_drift: bool = False,
) -> CachedTargets:
    """Return the source of targets for some objectives, read from stores.

    Args:
        stores: the teachers' stores.
        objectives: the objective of each student that trains on the same batches.
        views: number of views to use; defaults to all that the stores have in common.
        device: device of the targets; defaults to the CPU.
        reading: `resident`, `mapped` or `windowed`; `auto` chooses by size and free memory.
        allow_drift: accept views that this version renders differently, and list them in `drift`.

    Raises:
        StoreMismatch: the stores have no committed view in common, or this version renders other views.
        RecipeError: the stores have fewer views in common than `views`.
    """
    return open_targets(
        stores,
        arrays_of(stores, *objectives),
        views=views,
        device=device or torch.device("cpu"),
        reading=reading,
        allow_drift=allow_drift,
    )


def open_targets(
    stores: TeacherStores,
    arrays: Sequence[Sequence[str]],
    *,
    views: int | None,
    device: torch.device,
    reading: Reading | Literal["auto"],
    allow_drift: bool,
    free_bytes: int | None = None,
) -> CachedTargets:
    """Return the source of the given arrays of each store; arguments and errors otherwise as `make_targets`.

    Args:
        stores: the teachers' stores.
        arrays: names of the arrays to read from each store.
        views: number of views to use; None means all that the stores have in common.
        device: device of the targets.
        reading: `resident`, `mapped` or `windowed`; `auto` chooses by size and free memory.
        allow_drift: accept views that this version renders differently.
        free_bytes: memory that `auto` may use; defaults to the free memory.
    """
    chosen = common_views(stores.readers, arrays, views)
    drifted = check_drift(stores, chosen, allowed=allow_drift)
    if reading == "auto":
        reading = choose_reading(stores.readers, free_memory() if free_bytes is None else free_bytes, arrays)
    caches = open_caches([(reader.location, reader.manifest) for reader in stores.readers], arrays)
    readers = [
        StoreReader(reader.location, reading, cache)
        for reader, cache in zip(stores.readers, caches, strict=True)
    ]
    for reader in readers:
        reader.pinned = device.type == "cuda"
    return CachedTargets(readers, device, arrays, views=chosen, drift=drifted)


def arrays_of(stores: TeacherStores, *objectives: Objective) -> list[list[str]]:
    """Return the names of the arrays that the objectives read from each store."""
    return [
        list(
            dict.fromkeys(
                name
                for objective in objectives
                for name in (
                    *([LOGITS] if index in objective.config.logits_read(objective.context) else []),
                    *(f"{FEATURES}{tap}" for tap in objective.taps(index)),
                )
            )
        )
        for index in range(len(stores.readers))
    ]


def check_drift(stores: TeacherStores, views: Sequence[int], *, allowed: bool) -> tuple[str, ...]:
    """Return the differences between the stores' views and those that this version renders.

    Raises:
        StoreMismatch: there are differences, and `allowed` is false.
    """
    differences: list[str] = []
    made = MadeViews(stores.source, stores.view)
    for reader in stores.readers:
        lines = drift(reader.manifest, stores.source, stores.view, views, made=made)
        if lines and not allowed:
            shown = "\n".join(f"  {line}" for line in lines[:8])
            written = next(iter(reader.manifest.view_records.values()))["environments"]
            raise StoreMismatch(
                f"store {reader.address!r} was written from other views than this version makes:\n{shown}\n"
                f"Differences: {len(lines)}. It was written with {written}. Install those versions, run "
                "`precompute run` again into a new store, or train anyway with --allow-drift "
                "(allow_drift=True in Python), which is recorded in the run's provenance."
            )
        differences += [f"{reader.name}: {line}" for line in lines]
    return tuple(differences)


def check_store(reader: StoreReader, source: Source, view: ViewRecipe) -> None:
    """Check that a store was written from a source and a view recipe.

    Raises:
        StoreMismatch: it was written from others; the message shows the differences.
        TeacherMismatch: the teacher has other classes than the source.
    """
    identity = reader.manifest.identity
    if identity["source"]["fingerprint"] != source.fingerprint:
        raise StoreMismatch(
            f"store {reader.address!r} was written from source {identity['source']['name']!r} "
            f"({identity['source']['fingerprint'][:12]}), but {source.name!r} here is "
            f"{source.fingerprint[:12]}: train on the source that the teachers saw"
        )
    if identity["view"]["fingerprint"] != view_fingerprint(view, source):
        table = difference_table(identity["view"]["recipe"], view.model_dump(mode="json"), "store", "recipe")
        raise StoreMismatch(
            f"store {reader.address!r} was written with another view recipe than this run's.\n{table}\n"
            "Leave the view out to use the store's own."
        )
    if len(reader.manifest.class_names) != len(source.class_names):
        raise TeacherMismatch(
            f"store {reader.address!r} has {len(reader.manifest.class_names)} classes, but source "
            f"{source.name!r} has {len(source.class_names)}"
        )
    count = reader.manifest.samples
    if count != len(source.labels):
        raise StoreMismatch(
            f"store {reader.address!r} has {count:,} samples, but source {source.name!r} has "
            f"{len(source.labels):,}: train on the source that the teachers saw"
        )
    others = _other_labels(reader, source.labels)
    if len(others):
        raise StoreMismatch(
            f"store {reader.address!r} has other labels than source {source.name!r} for {len(others):,} of "
            f"{count:,} samples ({summarize_names(map(str, others))}), although their checksum is "
            "right, so other data may have changed too: run `precompute run` again into a new store"
        )


def _other_labels(reader: StoreReader, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the samples whose label in a store differs from the given one."""
    found, start = [], 0
    for stored in reader.table_pieces(LABELS):
        found.append(start + np.flatnonzero(stored != labels[start : start + len(stored)]))
        start += len(stored)
    return np.concatenate(found)
