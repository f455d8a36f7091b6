"""Picture of samples and their views with the predictions of several teachers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coursepack.data.batches import Batch
from coursepack.data.randomness import below, random_words
from coursepack.data.store import StoreReader
from coursepack.data.store.identity import check_complete
from coursepack.data.store.manifest import LOGITS
from coursepack.data.views import PRESETS, stored_view
from coursepack.errors import RecipeError, StoreMismatch
from coursepack.precompute.verify import source_of_stores

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


SAMPLES = 6
"""Number of samples, one row of the picture each."""
INCHES = 1.7
"""Side of one image, in inches."""
GAP = 0.1
"""Space between columns and below each row, in inches."""
LINE = 0.125
"""Height of a line of text, in inches."""
FONT_SIZE = 6
NAME_LETTERS = 14
"""Maximum number of letters of a store's name, and of a class name, below an image."""
TITLE_LETTERS = 26
"""Maximum number of letters of a class name above an image."""
FORMATS = (".png", ".svg", ".pdf")
"""Suffixes of the supported file formats."""


def draw_grid(
    stores: Sequence[str | Path],
    root: Path | None,
    views: int,
    path: Path,
    *,
    trust_code: bool = False,
) -> None:
    """Write a picture with one row per sample: the original image, then the first views common to all stores.

    Below each view is the top class of every teacher with its probability, in green if it is the label (for a
    mixed view, the label with the larger share).

    Args:
        stores: folders or addresses of stores of one source and one view recipe.
        root: folder of the source's files. Defaults to the recorded one.
        views: maximum number of views.
        path: file to write. Its suffix selects the format: `.png`, `.svg` or `.pdf`.
        trust_code: import and run Python code that the stores name for source or views.

    Raises:
        UntrustedCode: the stores name Python code, and `trust_code` is false.
        StoreMismatch: the stores were written from different pixels, have no view in common, or were written
            from another source than the one that is opened.
        RecipeError: the picture cannot be written to `path`.
    """
    from matplotlib.figure import Figure

    if path.suffix not in FORMATS:
        raise RecipeError(f"picture {str(path)!r} ends in {path.suffix!r}, expected one of {FORMATS}")
    readers = [StoreReader(store) for store in stores]
    for reader in readers:
        check_complete(reader.manifest, reader.address)
    holder, manifests = f"store {str(stores[0])!r}", [reader.manifest for reader in readers]
    recipe = stored_view(manifests[0].identity["view"]["recipe"], holder, trust_code=trust_code)
    recipe = recipe.located(str(stores[0]))
    source = source_of_stores(manifests, root, holder=holder, trust_code=trust_code)
    common = sorted(set.intersection(*(set(reader.views) for reader in readers)))[:views]
    if not common:
        raise StoreMismatch("the stores have no committed view in common: finish them with `precompute run`")
    samples = random_samples(len(source.labels))
    size = max(reader.manifest.identity["teacher"]["preprocessing"]["size"] for reader in readers)
    shape = (len(samples), 1 + len(common))
    figure = Figure()
    axes = _axes(figure, shape, lines=len(readers))
    plain = Batch(source, PRESETS["none"], samples, np.zeros_like(samples)).pixels(size)
    for row, sample in enumerate(samples):
        title = f"{sample}: {_short(source.class_names[source.labels[sample]], TITLE_LETTERS)}"
        _show(axes[row][0], plain[row].numpy(), title, [])
    for column, view in enumerate(common, start=1):
        batch = Batch(source, recipe, samples, np.full_like(samples, view))
        pixels = batch.pixels(size)
        captions = [_captions(reader, view, batch) for reader in readers]
        for row in range(len(samples)):
            _show(axes[row][column], pixels[row].numpy(), f"view {view}", [lines[row] for lines in captions])
    try:
        figure.savefig(path, dpi=160)
    except OSError as error:
        raise RecipeError(f"cannot write the picture {str(path)!r}: {error.strerror}") from error


def _axes(figure: Any, shape: tuple[int, int], lines: int) -> list[list[Any]]:
    """Return axes for the images by row and column, with space for a title and `lines` lines each."""
    rows, columns = shape
    wide, high = INCHES + GAP, LINE + INCHES + LINE * lines + GAP
    width, height = wide * columns, high * rows
    figure.set_size_inches(width, height)
    return [
        [
            figure.add_axes(
                (
                    (column * wide + GAP / 2) / width,
                    1 - (row * high + LINE + INCHES) / height,
                    INCHES / width,
                    INCHES / height,
                )
            )
            for column in range(columns)
        ]
        for row in range(rows)
    ]


def _short(text: str, letters: int) -> str:
    return text if len(text) <= letters else f"{text[: letters - 1]}\N{HORIZONTAL ELLIPSIS}"


def random_samples(count: int) -> np.ndarray:
    """Return the samples that pictures of a source with `count` samples show: the same each time, sorted."""
    words = random_words(0, np.arange(min(SAMPLES, count)), 0, 0)
    return np.unique(below(words[:, 0], count))


def _captions(reader: StoreReader, view: int, batch: Batch) -> list[tuple[str, bool]]:
    """Return a caption with the teacher's top class per row, and True if that class is the label."""
    probs = reader.rows(LOGITS, view, batch.samples).decode().softmax(dim=1)
    share, column = probs.max(dim=1)
    top = torch.tensor(reader.manifest.known_classes)[column]
    names, right = reader.manifest.class_names, (top == batch.main_labels).tolist()
    name = _short(reader.name, NAME_LETTERS)
    texts = [
        f"{name}: {_short(names[k], NAME_LETTERS)} {p:.0%}"
        for k, p in zip(top.tolist(), share.tolist(), strict=True)
    ]
    return list(zip(texts, right, strict=True))


def _show(axis: Any, pixels: np.ndarray, title: str, lines: list[tuple[str, bool]]) -> None:
    image = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axis.set_axis_off()
    axis.text(0.5, 1.02, title, transform=axis.transAxes, fontsize=FONT_SIZE, ha="center", va="bottom")
    for index, (text, right) in enumerate(lines):
        axis.text(
            0.5,
            -(0.2 + index) * LINE / INCHES,
            text,
            transform=axis.transAxes,
            fontsize=FONT_SIZE,
            color="#1a7f37" if right else "#b42318",
            ha="center",
            va="top",
        )
