"""Writing of a cache's answers to a store, block by block and resumably like a teacher's."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coursepack.console import progress, warn
from coursepack.data import view_fingerprint
from coursepack.data.drift import content_digest, view_record
from coursepack.data.encodings import FOR_LOGITS, parse_encoding, smaller_encoding
from coursepack.data.store import StorePlan, StoreWriter
from coursepack.data.store.manifest import LOGITS
from coursepack.data.store.planning import fresh_manifest
from coursepack.data.views import draw
from coursepack.data.views.recorded import COLUMNS, RECORDED, params_of
from coursepack.precompute.caches.base import IMPORTED
from coursepack.precompute.write import Sums

if TYPE_CHECKING:
    from pathlib import Path

    from coursepack.data import Source
    from coursepack.data.store import Block, Manifest
    from coursepack.precompute.caches.base import Cache, Rows

ROWS_AT_A_TIME = 4096
"""Rows of logits that are in memory together."""
BLOCK_MEMORY = 256 << 20
"""Maximum bytes of a cache's own rows that are in memory together."""
CHANCE = 1.2
"""Share of right answers, as a multiple of what guessing gives, below which a cache is reported."""
RECORDED_SIZE = 224
"""Default side in pixels of the images that the teacher of recorded views saw."""


def cache_plan(
    cache: Cache,
    source: Source,
    path: Path,
    *,
    encoding: str | None = None,
    size: int | None = None,
    root: Path | None = None,
) -> StorePlan:
    """Return the plan of the store that a cache is imported to.

    Args:
        cache: the opened cache.
        source: source that the cache was made from.
        path: file or folder of the cache, recorded in the store.
        encoding: encoding of logits. Defaults to the one that keeps the cache's precision.
        size: side in pixels of the images that the teacher saw, at which the drift guard compares pixels.
        root: folder of the source's files, recorded in the store.

    Raises:
        UnknownName, RecipeError: there is no such encoding.
    """
    shape = (len(source.class_names),)
    logits = smaller_encoding(parse_encoding(encoding or cache.encoding, FOR_LOGITS), shape)
    arrays: dict[str, Any] = {LOGITS: (logits, shape)}
    if cache.recipe.recorded is not None:
        arrays[RECORDED] = (parse_encoding("float32"), (COLUMNS,))
    default = cache.recipe.reference_size if cache.recipe.recorded is None else RECORDED_SIZE
    plan = StorePlan(
        identity={
            "teacher": {
                "network": f"{IMPORTED}:{cache.facts['format']}",
                "weights": cache.digest,
                # Only the size is known, or matters: the answers are not computed again.
                "preprocessing": {"size": size or default, "mean": [], "std": []},
                IMPORTED: cache.facts,
            },
            "view": {
                "recipe": cache.recipe.model_dump(mode="json"),
                "fingerprint": view_fingerprint(cache.recipe, source),
            },
            "source": {"name": source.name, "fingerprint": source.fingerprint},
            "precision": "not recorded",
        },
        origin={
            "weights_file": str(path.absolute()),
            "root": None if root is None else str(root.expanduser().absolute()),
        },
        labels=source.labels,
        class_names=source.class_names,
        views=cache.views,
        arrays=arrays,
    )
    most = max(1, BLOCK_MEMORY // max(1, cache.sample_bytes))
    return plan if fresh_manifest(plan).block_rows <= most else replace(plan, block_rows=most)


def import_cache(
    store: str | Path, cache: Cache, source: Source, plan: StorePlan, *, single_writer: bool = False
) -> Manifest:
    """Write the missing blocks of an imported store, and commit its views.

    Args:
        store: folder or address of the store.
        cache: the opened cache.
        source: source that the cache was made from.
        plan: result of `cache_plan`.
        single_writer: no other process writes to the store.

    Raises:
        StoreMismatch: there is another store at this address.
        StoreBusy: another process is writing it.
        EncodingRange: a value is outside the range of the encoding.
    """
    with StoreWriter(store, plan, single_writer=single_writer) as writer:
        writer.commit()
        done, total = writer.done_rows(), writer.owned_rows()
        with progress(f"import to {writer.location.name}", total, "rows", done=done) as meter:
            blocks = range(writer.blocks)
            order = (
                (view * writer.blocks + index for index in blocks for view in range(cache.views))
                if cache.by_sample
                else None
            )
            for block in writer.pending(order):
                rows = cache.load(block.view, block.start, block.stop)
                _write_block(writer, plan, cache, source, block, rows)
                meter.advance(len(block), f"view {block.view + 1} of {cache.views}")
                # Read by samples, all views are complete at the same time: they are committed together.
                if not cache.by_sample and writer.is_complete(block.view):
                    writer.commit()
        writer.commit()
        _check_accuracy(writer.manifest, source)
        return writer.manifest


def _write_block(
    writer: StoreWriter, plan: StorePlan, cache: Cache, source: Source, block: Block, rows: Rows
) -> None:
    recorded = rows.params
    if recorded is None:
        params = draw(cache.recipe, source, block.samples, block.view)
    else:
        params = params_of(recorded)
    size = plan.identity["teacher"]["preprocessing"]["size"]
    record = {
        **view_record(cache.recipe, source, params, block.start, block.view, size),
        "environment": {name: version(name) for name in ("coursepack", "torch", "torchvision", "numpy")},
    }
    if block.view == 0:
        record["content"] = content_digest(source, block.samples)
    files, sums = writer.write(block, record), Sums()
    for start in range(0, len(block), ROWS_AT_A_TIME):
        part = slice(start, min(start + ROWS_AT_A_TIME, len(block)))
        values = {LOGITS: rows.logits(part)}
        if recorded is not None:
            values[RECORDED] = recorded[part].astype(np.float32)
        files.add(values)
        sums.add(values[LOGITS], torch.from_numpy(source.labels[block.samples[part]]))
    files.finish(sums.total)


def _check_accuracy(manifest: Manifest, source: Source) -> None:
    """Warn about answers that are hardly ever right."""
    accuracy = manifest.totals["correct"] / max(manifest.totals["rows"], 1.0)
    classes = len(source.class_names)
    if classes > 1 and accuracy < CHANCE / classes:
        warn(
            f"warning: the top class of the imported answers is the label for {accuracy:.1%} of the "
            "samples, which is "
            "hardly more than by chance: check that the cache has the source's samples and classes in "
            "their order"
        )
