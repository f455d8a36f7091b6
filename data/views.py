"""View recipes: view v of sample i as a pure function of the recipe's seed, i and v.

Drawing and rendering are two steps. `draw` gives parameters in normalised coordinates on a grid of 2**-16,
equal on every platform; `render` turns them into uint8 pixels of any size with integer arithmetic, so pixels
are equal too. A teacher at 224 and a student at 160 see the same crop.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import google_crc32c
import numpy as np
from pydantic import Field

from coursepack.canonical import fingerprint
from coursepack.config import Config, parse_config, read_yaml
from coursepack.data.randomness import Purpose, below, random_words
from coursepack.errors import UnknownName

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from coursepack.data.randomness import Samples
    from coursepack.data.sources import Source

GRID = 1 << 16
"""Steps of a normalised coordinate over the side of an image."""


@dataclass(frozen=True)
class ViewParams:
    """What was drawn for each row."""

    boxes: NDArray[np.int32]
    """Crop box `(N, 4)`: top, left, height, width, in 2**-16 of the image's side. Outside is black."""

    def digest(self) -> str:
        """crc32c over all numbers drawn, 8 hex digits."""
        return f"{google_crc32c.value(self.boxes.astype('<i4').tobytes()):08x}"


class PadCrop(Config):
    """Pad by a few black pixels on each side, then crop the original size at a random whole pixel."""

    op: Literal["pad_crop"] = "pad_crop"
    padding: Annotated[int, Field(ge=1)]
    """Pixels of the reference frame."""

    def draw(self, params: ViewParams, words: NDArray[np.uint32], reference_size: int) -> ViewParams:
        """Move each box by -padding..padding reference pixels down and right."""
        shift = below(words[:, :2], 2 * self.padding + 1) - self.padding
        boxes = params.boxes.copy()
        boxes[:, :2] += (shift * GRID // reference_size).astype(np.int32)
        return ViewParams(boxes)


class ViewRecipe(Config):
    """An ordered list of ops, drawn independently for every (sample, view)."""

    ops: tuple[PadCrop, ...] = ()
    """Applied in order."""
    reference_size: Annotated[int, Field(ge=1)] = 32
    """Side in pixels of the frame in which pixel-unit parameters are meant."""
    seed: Annotated[int, Field(ge=0, lt=1 << 64)] = 0
    """Key of the generator."""


PRESETS = {
    "none": ViewRecipe(),
    "digits": ViewRecipe(ops=(PadCrop(padding=1),), reference_size=8),
}


def view_recipe(name: str, seed: int | None = None) -> ViewRecipe:
    """A preset by name, or the recipe in a YAML file.

    Args:
        name: a name in `PRESETS`, or a path that ends in .yaml or .yml.
        seed: replaces the recipe's seed.

    Raises:
        UnknownName: no such preset.
        RecipeError: the file is not a view recipe.
    """
    if name.endswith((".yaml", ".yml")):
        recipe = parse_config(ViewRecipe, read_yaml(Path(name)), f"view recipe {name!r}")
    elif name in PRESETS:
        recipe = PRESETS[name]
    else:
        raise UnknownName("view", name, [*PRESETS, "a .yaml file"])
    return recipe if seed is None else recipe.model_copy(update={"seed": seed})


def view_fingerprint(recipe: ViewRecipe, source: Source) -> str:
    """sha256 of what determines every view of every sample; stores carry it and students check it."""
    return fingerprint({"recipe": recipe.model_dump(mode="json"), "source": source.fingerprint})


def draw(recipe: ViewRecipe, samples: Samples, view: int) -> ViewParams:
    """Parameters of one view of the given samples, whatever else is drawn beside them."""
    boxes = np.zeros((len(samples), 4), dtype=np.int32)
    boxes[:, 2:] = GRID
    params = ViewParams(boxes)
    for place, op in enumerate(recipe.ops):
        words = random_words(recipe.seed, samples, view, Purpose.VIEW + place)
        params = op.draw(params, words, recipe.reference_size)
    return params


def render(source: Source, samples: Samples, params: ViewParams, size: int) -> NDArray[np.uint8]:
    """Pixels `(N, size, size, channels)` of the given samples under drawn parameters.

    Each output pixel is interpolated between its four nearest source pixels with weights of 11 bits, and
    rounded half up once. A crop that falls on whole pixels at the source's own size is an exact copy.
    """
    from coursepack.data.jit_pixels import crop_resize

    pixels = source.pixels(samples)
    out = np.empty((len(samples), size, size, source.channels), dtype=np.uint8)
    if isinstance(pixels, np.ndarray):
        crop_resize(pixels, params.boxes, out)
    else:
        for row, image in enumerate(pixels):
            crop_resize(image[None], params.boxes[row : row + 1], out[row : row + 1])
    return out
