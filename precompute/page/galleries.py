"""Sections with samples, their views, and the most probable classes according to every teacher."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from coursepack.data.batches import Batch
from coursepack.data.views import PRESETS, stored_view
from coursepack.kernels import MixedLabels
from coursepack.pages.blocks import (
    Caption,
    Gallery,
    Picture,
    Row,
    Section,
    Table,
    Text,
    count,
    number,
    percent,
    text,
)
from coursepack.precompute.page.answers import answers, disagreement
from coursepack.precompute.picture import random_samples
from coursepack.precompute.verify import source_of_stores

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from coursepack.data import Source, ViewRecipe
    from coursepack.pages.blocks import Block
    from coursepack.precompute.page.answers import Disagreement
    from coursepack.precompute.page.opened import OpenedStore

MAX_PIXELS = 160
"""Maximum side of a picture, in pixels."""
TOP_CLASSES = 3
"""Number of classes shown of each answer."""
MAX_DISPUTED = 8
"""Number of samples shown that the teachers disagree about most."""
MAX_CLASSES = 200
"""Maximum number of rows of the table of classes."""


@dataclass(frozen=True)
class Images:
    """Images of a source and their views, as PNG files."""

    source: Source
    recipe: ViewRecipe
    size: int
    """Side in pixels."""

    def originals(self, samples: NDArray[np.int64]) -> list[bytes]:
        """Return the images without augmentation, stretched to a square."""
        batch = Batch(self.source, PRESETS["none"], samples, np.zeros_like(samples))
        return [png(image) for image in batch.pixels(self.size).numpy()]

    def batch(self, samples: NDArray[np.int64], view: int) -> Batch:
        """Return samples in one view."""
        return Batch(self.source, self.recipe, samples, np.full_like(samples, view))

    def rendered(self, batch: Batch) -> list[bytes]:
        """Return the images of a batch."""
        return [png(image) for image in batch.pixels(self.size).numpy()]


def open_images(opened: Sequence[OpenedStore], root: Path | None, *, trust_code: bool) -> Images:
    """Open the source and the view recipe of stores.

    Raises:
        UntrustedCode, StoreMismatch, SourceError, RecipeError: as `source_of_stores`.
    """
    manifests = [store.manifest for store in opened]
    holder = f"store {opened[0].address!r}"
    recipe = stored_view(manifests[0].identity["view"]["recipe"], holder, trust_code=trust_code)
    recipe = recipe.located(opened[0].address)
    source = source_of_stores(manifests, root, holder=holder, trust_code=trust_code)
    size = max(manifest.identity["teacher"]["preprocessing"]["size"] for manifest in manifests)
    return Images(source, recipe, min(size, MAX_PIXELS))


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Return an image `(H, W, 1 or 3)` as the content of a PNG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
    return file.getvalue()


def samples_section(opened: Sequence[OpenedStore], views: Sequence[int], images: Images | None) -> Section:
    """Return random samples in some views, with the answers of every teacher."""
    if not views:
        return Section("samples", "Samples", ())
    manifest = opened[0].manifest
    samples = random_samples(manifest.samples)
    titles = [f"Sample {sample}: {name}" for sample, name in _named(opened, samples)]
    note = Text(
        "Below each view, the most probable classes according to every teacher. The first is in green if it "
        "is the label, for mixed images the label with the larger share, else in red."
    )
    galleries = _galleries(titles, opened, samples, views, images)
    return Section("samples", "Samples", (note, *galleries))


def disagreement_section(
    opened: Sequence[OpenedStore], views: Sequence[int], images: Images | None
) -> Section:
    """Return the samples of a view that several teachers disagree about most, and disagreement by class."""
    title = "Disagreement of the teachers"
    readers = [store.reader for store in opened if store.reader is not None]
    if len(readers) < 2 or not views:
        return Section("disagreement", title, ())
    view = views[0]
    found = disagreement(readers, view)
    order = np.argsort(-found.divergence, kind="stable")[:MAX_DISPUTED].astype(np.int64)
    titles = [
        f"Sample {sample}: {name}, divergence {found.divergence[sample]:.3f}"
        for sample, name in _named(opened, order)
    ]
    note = Text(
        f"All samples in view {view}. The divergence is that of Jensen and Shannon at temperature 1, the "
        "mean over teachers of KL(teacher || mean of the teachers): at most "
        f"{np.log(len(readers)):.3f} nats for {len(readers)} teachers, here {found.divergence.mean():.3f} in "
        f"the mean. All teachers have the same top class for {found.same_class.mean():.2%} of the samples."
    )
    blocks: list[Block] = [note, *_galleries(titles, opened, order, [view], images)]
    return Section("disagreement", title, (*blocks, _by_class(opened, found)))


def _by_class(opened: Sequence[OpenedStore], found: Disagreement) -> Table:
    labels = next(store.reader.labels() for store in opened if store.reader is not None)
    names = opened[0].manifest.class_names
    samples = np.bincount(labels, minlength=len(names))
    divergence = np.bincount(labels, found.divergence, len(names)) / np.maximum(samples, 1)
    same = np.bincount(labels, found.same_class, len(names)) / np.maximum(samples, 1)
    order = [label for label in np.argsort(-divergence, kind="stable").tolist() if samples[label]]
    largest = float(divergence.max(initial=0.0)) or 1.0
    rows = tuple(
        Row(
            (
                text(names[label]),
                count(int(samples[label])),
                number(float(divergence[label]), heat=float(divergence[label]) / largest),
                percent(float(same[label])),
            )
        )
        for label in order[:MAX_CLASSES]
    )
    header = ("class", "samples", "mean divergence, nats", "same top class")
    return Table("Disagreement by class", header, rows)


def _named(opened: Sequence[OpenedStore], samples: NDArray[np.int64]) -> list[tuple[int, str]]:
    """Return samples with the names of their labels."""
    labels = next(store.reader.labels() for store in opened if store.reader is not None)
    names = opened[0].manifest.class_names
    return [(sample, names[labels[sample]]) for sample in samples.tolist()]


def _galleries(
    titles: Sequence[str],
    opened: Sequence[OpenedStore],
    samples: NDArray[np.int64],
    views: Sequence[int],
    images: Images | None,
) -> list[Gallery]:
    """Return a gallery for each sample: the original and its views."""
    columns = [_view(opened, samples, view, images) for view in views]
    if images is not None:
        columns.insert(0, [Picture("original", content) for content in images.originals(samples)])
    return [Gallery(title, tuple(column[row] for column in columns)) for row, title in enumerate(titles)]


def _view(
    opened: Sequence[OpenedStore], samples: NDArray[np.int64], view: int, images: Images | None
) -> list[Picture]:
    """Return a picture of each sample in a view, with captions of all teachers."""
    names = opened[0].manifest.class_names
    readers = [(store, store.reader) for store in opened if store.reader is not None]
    labels = readers[0][1].labels()[samples].tolist()
    titles = [f"view {view}"] * len(samples)
    contents: list[bytes | None] = [None] * len(samples)
    if images is not None:
        batch = images.batch(samples, view)
        contents = list(images.rendered(batch))
        labels = batch.main_labels.tolist()
        if isinstance(batch.labels, MixedLabels):
            mixed = zip(batch.labels.second.tolist(), (1 - batch.labels.lam).tolist(), strict=True)
            titles = [f"view {view}, {share:.0%} {names[other]}" for other, share in mixed]
    captions: list[list[Caption]] = [[] for _ in titles]
    for store, reader in readers:
        for row, answer in enumerate(answers(reader, view, samples, TOP_CLASSES)):
            lines = tuple(
                f"{names[label]} {prob:.0%}" for label, prob in zip(answer.classes, answer.probs, strict=True)
            )
            is_right = answer.classes[0] == labels[row]
            captions[row].append(Caption(store.label, lines, is_right, store.index))
    return [
        Picture(title, content, tuple(lines))
        for title, content, lines in zip(titles, contents, captions, strict=True)
    ]
