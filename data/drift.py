"""Drift guard: checks that the installed code and libraries still produce a store's views.

A store keeps checksums of the view parameters of each block, and of the pixels of a few samples of each view.
Before a student's first step, parameters are drawn and pixels rendered again and compared with these
checksums.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np

from coursepack.data.randomness import Purpose, below, random_words
from coursepack.data.sources.roots import summarize_names
from coursepack.data.store.layout import block_count
from coursepack.data.views import draw, render

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from coursepack.data.randomness import Samples
    from coursepack.data.sources import Source
    from coursepack.data.store.manifest import Manifest
    from coursepack.data.views import ViewParams, ViewRecipe

PROBES = 4
"""Number of samples per view whose pixel checksums are stored."""
MAX_VIEWS = 64
"""Maximum number of views checked before a run, evenly spaced."""


def probe_samples(count: int, view: int) -> Samples:
    """Return the samples of a source of `count` samples whose pixel checksums are stored for a view."""
    words = random_words(0, np.arange(PROBES), view, Purpose.PROBE)
    return np.unique(below(words[:, 0], count))


def probe_digests(
    recipe: ViewRecipe, source: Source, samples: Samples, params: ViewParams, size: int
) -> dict[str, str]:
    """Return the crc32c of each sample's pixels, rendered on the CPU at `size`, keyed by sample index."""
    pixels = render(recipe, source, samples, params, size)
    return {
        str(sample): f"{google_crc32c.value(image.tobytes()):08x}"
        for sample, image in zip(samples.tolist(), pixels, strict=True)
    }


def view_record(
    recipe: ViewRecipe, source: Source, params: ViewParams, first: int, view: int, size: int
) -> dict[str, Any]:
    """Return the members of a block's record that `drift` compares.

    Args:
        recipe: view recipe of the store.
        source: source of the samples.
        params: view parameters of the block's samples.
        first: the block's first sample.
        view: view index.
        size: side in pixels of the rendered probes.
    """
    probed = probe_samples(len(source.labels), view)
    probed = probed[(probed >= first) & (probed < first + len(params))]
    return {
        "draws": params.digest(),
        "probes": probe_digests(recipe, source, probed, params[probed - first], size),
    }


def content_digest(source: Source, samples: Samples) -> str:
    """Return the crc32c of the samples' raw content: the bytes of their files, or their pixels in memory."""
    return digest_of(source.contents(samples))


def digest_of(contents: NDArray[np.uint32]) -> str:
    """Return the crc32c of the checksums `(n,)` that `Source.contents` returns."""
    return f"{google_crc32c.value(contents.astype('<u4').tobytes()):08x}"


def changed_content(
    manifest: Manifest,
    source: Source,
    begun: float = math.inf,
    *,
    on_samples: Callable[[int], None] | None = None,
) -> tuple[str, ...]:
    """Return one message per block whose files or pixels differ from those that the teacher saw.

    Reads the whole source. A store keeps one checksum per block, so the changed file itself is unknown: a
    message names the first and the last file of the block, and those modified after `begun` (seconds since
    the epoch). `on_samples` is called after each block with its number of samples, to show progress.
    """
    recorded = manifest.view_records.get("0", {}).get("content", [])
    messages = []
    for block, digest in enumerate(recorded):
        start = block * manifest.block_rows
        stop = min(start + manifest.block_rows, manifest.samples)
        if content_digest(source, np.arange(start, stop)) != digest:
            messages.append(
                f"source {source.name!r}: samples {start} to {stop - 1} differ from what the teacher saw"
                f"{_file_range(source, range(start, stop), begun)}"
            )
        if on_samples is not None:
            on_samples(stop - start)
    return tuple(messages)


def _file_range(source: Source, samples: range, begun: float) -> str:
    """Return the first and last file of the samples, and files modified after `begun`, to end a message."""
    first, last = source.path(samples[0]), source.path(samples[-1])
    if first is None or last is None:
        return ""
    paths = (source.path(sample) for sample in samples)
    modified = [path for path in paths if path is not None and Path(path).stat().st_mtime > begun]
    since = f"; modified since the store was created: {summarize_names(modified)}" if modified else ""
    return f": {first} to {last}{since}"


class MadeViews:
    """Checksums of the views that the installed version makes, each computed once for several stores."""

    def __init__(self, source: Source, recipe: ViewRecipe) -> None:
        self._source, self._recipe = source, recipe
        self._drawn: dict[tuple[int, int, int], str] = {}
        self._pixels: dict[tuple[int, int, tuple[int, ...]], dict[str, str]] = {}

    def drawn(self, view: int, start: int, stop: int) -> str:
        """Return the checksum of the parameters of samples `start` to `stop` in a view."""
        place = (view, start, stop)
        if place not in self._drawn:
            samples = np.arange(start, stop)
            self._drawn[place] = draw(self._recipe, self._source, samples, view).digest()
        return self._drawn[place]

    def pixels(self, view: int, size: int, chosen: tuple[int, ...]) -> dict[str, str]:
        """Return the checksums of some samples' pixels in a view, as `probe_digests` does."""
        place = (view, size, chosen)
        if place not in self._pixels:
            samples: NDArray[np.int64] = np.array(chosen, dtype=np.int64)
            params = draw(self._recipe, self._source, samples, view)
            self._pixels[place] = probe_digests(self._recipe, self._source, samples, params, size)
        return self._pixels[place]


def drift(
    manifest: Manifest,
    source: Source,
    recipe: ViewRecipe,
    views: Iterable[int],
    *,
    every_block: bool = False,
    made: MadeViews | None = None,
) -> tuple[str, ...]:
    """Return one message per block or sample whose view parameters or pixels differ from the store's.

    Args:
        manifest: manifest of the store.
        source: source that the store's teacher saw.
        recipe: view recipe of the store.
        views: committed views to check; at most 64 of them unless `every_block`.
        every_block: check the view parameters of all blocks instead of one block per view.
        made: checksums of the source and recipe that were computed for other stores.
    """
    made = made or MadeViews(source, recipe)
    checked = sorted(views)
    if not every_block and len(checked) > MAX_VIEWS:
        checked = [checked[len(checked) * k // MAX_VIEWS] for k in range(MAX_VIEWS)]
    blocks = block_count(manifest.samples, manifest.block_rows)
    messages = []
    for view in checked:
        record = manifest.view_records[str(view)]
        for block in range(blocks) if every_block else [view % blocks]:
            start = block * manifest.block_rows
            stop = min(start + manifest.block_rows, manifest.samples)
            if made.drawn(view, start, stop) != record["draws"][block]:
                messages.append(
                    f"view {view}, block {block}: the installed version draws different view parameters"
                )
        messages += _changed_pixels(manifest, made, view)
    return tuple(messages)


def _changed_pixels(manifest: Manifest, made: MadeViews, view: int) -> list[str]:
    probes = manifest.view_records[str(view)].get("probes", {})
    if not probes:
        return []
    size = manifest.identity["teacher"]["preprocessing"]["size"]
    digests = made.pixels(view, size, tuple(sorted(map(int, probes))))
    return [
        f"view {view}, sample {sample}: the installed version renders different pixels"
        for sample, digest in digests.items()
        if digest != probes[sample]
    ]
