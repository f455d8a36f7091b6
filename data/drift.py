"""Does this version of the code, and of its libraries, still make the views that a store's teacher saw?

A store keeps checksums of the drawn parameters per block, and of the pixels of a few samples of every view.
Before a student's first step they are drawn and rendered again.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import google_crc32c
import numpy as np

from coursepack.data.randomness import Purpose, below, random_words
from coursepack.data.sources.roots import some
from coursepack.data.store.layout import block_count
from coursepack.data.views import draw, render

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from coursepack.data.randomness import Samples
    from coursepack.data.sources import Source
    from coursepack.data.store.manifest import Manifest
    from coursepack.data.views import ViewParams, ViewRecipe

PROBES = 4
"""Samples of each view whose pixels are kept as checksums."""
MOST_VIEWS = 64
"""Views that are looked at before a run, evenly spread."""


def probe_samples(count: int, view: int) -> Samples:
    """The samples of a source of `count` whose pixels a store vouches for in one view."""
    words = random_words(0, np.arange(PROBES), view, Purpose.PROBE)
    return np.unique(below(words[:, 0], count))


def probe_digests(
    recipe: ViewRecipe, source: Source, samples: Samples, params: ViewParams, size: int
) -> dict[str, str]:
    """crc32c of each sample's pixels at a size, rendered on the CPU, by sample."""
    pixels = render(recipe, source, samples, params, size)
    return {
        str(sample): f"{google_crc32c.value(image.tobytes()):08x}"
        for sample, image in zip(samples.tolist(), pixels, strict=True)
    }


def content_digest(source: Source, samples: Samples) -> str:
    """crc32c over what the samples' pixels come from: files' bytes, or pixels in memory."""
    return f"{google_crc32c.value(source.contents(samples).astype('<u4').tobytes()):08x}"


def changed_content(manifest: Manifest, source: Source, begun: float = math.inf) -> tuple[str, ...]:
    """Blocks of samples whose files or pixels are not what the teacher saw; reads all of the source.

    A store keeps one checksum per block, so the file itself is not known: the first and the last of the
    block are named, and those that changed after `begun`, seconds since the epoch.
    """
    recorded = manifest.view_records.get("0", {}).get("content", [])
    found = []
    for block, digest in enumerate(recorded):
        start = block * manifest.block_rows
        stop = min(start + manifest.block_rows, manifest.samples)
        if content_digest(source, np.arange(start, stop)) != digest:
            found.append(
                f"source {source.name!r}: samples {start} to {stop - 1} are not what the teacher saw"
                f"{_files(source, range(start, stop), begun)}"
            )
    return tuple(found)


def _files(source: Source, samples: range, begun: float) -> str:
    """The files of some samples and those of them that changed since, as the end of a line."""
    first, last = source.path(samples[0]), source.path(samples[-1])
    if first is None or last is None:
        return ""
    paths = (source.path(sample) for sample in samples)
    later = [path for path in paths if path is not None and Path(path).stat().st_mtime > begun]
    since = f"; changed since the store was begun: {some(later)}" if later else ""
    return f": {first} to {last}{since}"


def drift(
    manifest: Manifest, source: Source, recipe: ViewRecipe, views: Iterable[int], *, every_block: bool = False
) -> tuple[str, ...]:
    """What a store's views are no longer: one line per block or sample that comes out otherwise.

    Args:
        manifest: the store's.
        source: what its teacher saw.
        recipe: its view recipe.
        views: committed views to look at; at most 64 of them, unless `every_block`.
        every_block: draw all parameters again, and not those of one block per view.
    """
    chosen = sorted(views)
    if not every_block and len(chosen) > MOST_VIEWS:
        chosen = [chosen[len(chosen) * k // MOST_VIEWS] for k in range(MOST_VIEWS)]
    blocks = block_count(manifest.samples, manifest.block_rows)
    found = []
    for view in chosen:
        record = manifest.view_records[str(view)]
        for block in range(blocks) if every_block else [view % blocks]:
            start = block * manifest.block_rows
            samples = np.arange(start, min(start + manifest.block_rows, manifest.samples))
            if draw(recipe, source, samples, view).digest() != record["draws"][block]:
                found.append(f"view {view}, block {block}: this version draws other view parameters")
        found += _other_pixels(manifest, source, recipe, view)
    return tuple(found)


def _other_pixels(manifest: Manifest, source: Source, recipe: ViewRecipe, view: int) -> list[str]:
    probes = manifest.view_records[str(view)].get("probes", {})
    samples: NDArray[np.int64] = np.array(sorted(map(int, probes)), dtype=np.int64)
    if len(samples) == 0:
        return []
    size = manifest.identity["teacher"]["preprocessing"]["size"]
    now = probe_digests(recipe, source, samples, draw(recipe, source, samples, view), size)
    return [
        f"view {view}, sample {sample}: this version renders other pixels"
        for sample, digest in now.items()
        if digest != probes[sample]
    ]
