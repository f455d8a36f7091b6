"""Drawing of view parameters from a recipe, a source, samples and a view index."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from coursepack.data.randomness import Draws, Purpose
from coursepack.data.views.geometry import GEOMETRY_OPS, Frame, HorizontalFlip, VerticalFlip
from coursepack.data.views.params import Mixing, ViewParams
from coursepack.data.views.recorded import Recorded

if TYPE_CHECKING:
    from coursepack.data.randomness import Samples
    from coursepack.data.sources import Source
    from coursepack.data.views.recipe import ViewRecipe


def draw(recipe: ViewRecipe, source: Source, samples: Samples, view: int) -> ViewParams:
    """Draw the parameters of one view of the samples, `(N,)` rows that do not depend on each other.

    No image is decoded: only the number of samples and the images' sizes are read from the source.
    """
    params = _draw_unmixed(recipe, source, samples, view)
    if recipe.mix is None:
        return params
    draws = Draws(recipe.seed, samples, view, Purpose.MIXING)
    kinds, partners, shares, boxes = recipe.mix.draw(draws, len(source.labels))
    others = _draw_unmixed(recipe, source, partners, view)
    return replace(params, mixing=Mixing(kinds, partners, shares, boxes, others))


def _draw_unmixed(recipe: ViewRecipe, source: Source, samples: Samples, view: int) -> ViewParams:
    frame = Frame.full(source.sizes(samples), recipe.reference_size)
    pixel_ops = []
    for index, op in enumerate(recipe.ops):
        if isinstance(op, Recorded):  # the only op
            return op.params(samples, view)
        draws = Draws(recipe.seed, samples, view, Purpose.VIEW + index)
        if isinstance(op, GEOMETRY_OPS):
            op.draw(draws, frame)
        else:
            pixel_ops.append(op.draw(draws, recipe.reference_size))
    flips = any(isinstance(op, (HorizontalFlip, VerticalFlip)) for op in recipe.ops)
    return ViewParams(frame.boxes.astype(np.int32), frame.flips if flips else None, tuple(pixel_ops))
