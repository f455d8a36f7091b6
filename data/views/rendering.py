"""From drawn parameters to uint8 pixels of any size, on the CPU or on a GPU that holds the images.

On the CPU geometry and mixing are compiled kernels in integer arithmetic. On a GPU the same integers go
through matrix products in float64, which carries them exactly, so both give the same pixels; ops on rendered
pixels are torchvision's on both.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from coursepack.data.views.params import CUTMIX, GRID, MIRRORED, MIXUP, UPSIDE_DOWN

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from coursepack.data.randomness import Samples
    from coursepack.data.sources import Source
    from coursepack.data.views.params import Mixing, ViewParams
    from coursepack.data.views.recipe import ViewRecipe


def render(
    recipe: ViewRecipe,
    source: Source,
    samples: Samples,
    params: ViewParams,
    size: int,
    *,
    threads: int = 1,
) -> NDArray[np.uint8]:
    """Pixels `(N, size, size, channels)` of the given samples under drawn parameters.

    Args:
        recipe: whose ops the parameters belong to.
        source: where the images are.
        samples: `(N,)`.
        params: from `draw`, of the same samples.
        size: side in pixels.
        threads: how many threads resample.

    Raises:
        SourceError: an image cannot be decoded.
        RecipeError: the recipe's own pipeline gives something else than pixels of this size.
    """
    out = _render_unmixed(recipe, source, samples, params, size, threads)
    if params.mixing is not None:
        from coursepack.data.jit_pixels import blend

        mixing = params.mixing
        rows = np.flatnonzero(mixing.kinds)
        others = np.empty_like(out)
        others[rows] = _render_unmixed(
            recipe, source, mixing.partners[rows], mixing.params[rows], size, threads
        )
        blend(out, others, mixing.kinds, mixing.shares, mixing.boxes)
    return out


def render_normalised(
    recipe: ViewRecipe,
    source: Source,
    samples: Samples,
    params: ViewParams,
    size: int,
    channel: Sequence[int],
    table: NDArray[np.float32],
) -> NDArray[np.float32] | None:
    """`render`, and each level looked up in the same pass: what a network reads, `(N, channels, S, S)`.

    Args:
        recipe, source, samples, params, size: as for `render`.
        channel: for each channel of the network the one of the source.
        table: `(channels, 256)`, the value of each level.

    Returns:
        None where it takes more than one pass: image files, mixing, and ops on rendered pixels.
    """
    if source.whole is None or params.mixing is not None or params.pixel_ops:
        return None
    from coursepack.data.jit_pixels import normalise_rows

    _check_samples(source.whole, samples)
    flips = np.zeros(len(samples), np.uint8) if params.flips is None else params.flips
    out = np.empty((len(samples), len(channel), size, size), np.float32)
    beyond = recipe.filters_before_cropping
    normalise_rows(source.whole, samples, params.boxes, flips, beyond, np.asarray(channel), table, out)
    return out


def _check_samples(whole: NDArray[np.uint8], samples: Samples) -> None:
    """Kernels read by address: what numpy would refuse has to be refused here."""
    if len(samples) and not 0 <= samples.min() <= samples.max() < len(whole):
        raise IndexError(f"samples are {samples.min()} to {samples.max()} of {len(whole)}")


def _render_unmixed(
    recipe: ViewRecipe, source: Source, samples: Samples, params: ViewParams, size: int, threads: int
) -> NDArray[np.uint8]:
    out = np.empty((len(samples), size, size, source.channels), dtype=np.uint8)
    if recipe.pipeline is not None:
        recipe.pipeline.render(list(source.pixels(samples)), params.pixel_ops[0], out)
        return out
    _resample(recipe, source, samples, params, out, threads)
    if recipe.pixel_ops:
        import torch

        _change_pixels(recipe, params, torch.from_numpy(out))
    return out


def _resample(
    recipe: ViewRecipe,
    source: Source,
    samples: Samples,
    params: ViewParams,
    out: NDArray[np.uint8],
    threads: int,
) -> None:
    from coursepack.data.jit_pixels import resample, resample_rows

    flips = np.zeros(len(samples), np.uint8) if params.flips is None else params.flips
    images = source.pixels(samples) if source.whole is None else None
    beyond = recipe.filters_before_cropping
    if source.whole is not None:
        _check_samples(source.whole, samples)

    def some(rows: slice) -> None:
        if source.whole is not None:
            resample_rows(source.whole, samples[rows], params.boxes[rows], flips[rows], beyond, out[rows])
        elif images is not None:
            for n in range(*rows.indices(len(samples))):
                resample(images[n], params.boxes[n], flips[n], beyond, out[n])

    if threads == 1:
        some(slice(None))
        return
    share = -(-len(samples) // threads)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(some, [slice(start, start + share) for start in range(0, len(samples), share)]))


def _change_pixels(recipe: ViewRecipe, params: ViewParams, pixels: Tensor) -> None:
    """Apply the ops on rendered pixels to `(N, S, S, C)` uint8 in place."""
    columns = [values.tolist() for values in params.pixel_ops]
    for n in range(len(pixels)):
        before = image = pixels[n].permute(2, 0, 1).contiguous()
        for op, values in zip(recipe.pixel_ops, columns, strict=True):
            image = op.apply(image, values[n], recipe.reference_size)
        if image is not before:
            pixels[n] = image.permute(1, 2, 0)


def render_on_device(
    recipe: ViewRecipe, images: Tensor, samples: Samples, params: ViewParams, size: int
) -> Tensor:
    """`render` of images that are on a device, there.

    Args:
        recipe: whose ops the parameters belong to; not a pipeline.
        images: the source's `whole`, `(M, H, W, C)` uint8 on the device.
        samples: `(N,)`.
        params: from `draw`, of the same samples.
        size: side in pixels.

    Returns:
        `(N, size, size, channels)` uint8 on the device; resampled and mixed pixels equal the CPU's, those
        that torchvision changed are within one level.
    """
    out = _unmixed_on_device(recipe, images, samples, params, size)
    if params.mixing is None:
        return out
    mixing = params.mixing
    others = _unmixed_on_device(recipe, images, mixing.partners, mixing.params, size)
    return _blend_on_device(out, others, mixing)


def _unmixed_on_device(
    recipe: ViewRecipe, images: Tensor, samples: Samples, params: ViewParams, size: int
) -> Tensor:
    import torch

    from coursepack.data.jit_pixels import HALF, ONE

    flips = np.zeros(len(samples), np.uint8) if params.flips is None else params.flips
    _, height, width, channels = images.shape
    beyond = recipe.filters_before_cropping
    rows = _matrices(params.boxes[:, 0::2], height, size, flips & UPSIDE_DOWN > 0, beyond)
    columns = _matrices(params.boxes[:, 1::2], width, size, flips & MIRRORED > 0, beyond)
    chosen = images[_moved(samples, images.device)].double()
    half, one = float(HALF), float(ONE)
    # Not float32, which a user may have allowed to be multiplied with fewer bits.
    tall = torch.bmm(_moved(rows, images.device), chosen.reshape(len(samples), height, width * channels))
    tall = ((tall + half) / one).floor_().reshape(len(samples), size, width, channels)
    wide = torch.einsum("nxw,nywc->nyxc", _moved(columns, images.device), tall)
    pixels = ((wide + half) / one).floor_().to(torch.uint8)
    if recipe.pixel_ops:
        _change_pixels(recipe, params, pixels)
    return pixels


def _matrices(
    spans: NDArray[np.int32], side: int, size: int, flips: NDArray[np.bool_], beyond: bool
) -> NDArray[np.float64]:
    """The weights of one axis as matrices `(N, size, side)`."""
    from coursepack.data.jit_pixels import axis_matrices

    matrices = np.empty((len(spans), size, side))
    axis_matrices(spans, flips, side, beyond, matrices)
    return matrices


def _moved(values: NDArray[np.generic], device: torch.device) -> Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)


def _blend_on_device(first: Tensor, second: Tensor, mixing: Mixing) -> Tensor:
    import torch

    size, device = first.shape[1], first.device
    shares = np.where(mixing.kinds == MIXUP, mixing.shares, GRID)
    share = _moved(shares, device).to(torch.int32)[:, None, None, None]
    blended = (first.int() * share + second.int() * (GRID - share) + GRID // 2) >> 16
    edges = mixing.boxes.astype(np.int64)
    edges[:, 2:] += edges[:, :2]
    top, left, bottom, right = _moved((edges * size + GRID // 2) >> 16, device)[:, :, None].unbind(1)
    place = torch.arange(size, device=device)
    inside = ((place >= top) & (place < bottom))[:, :, None] & ((place >= left) & (place < right))[:, None]
    inside &= _moved(mixing.kinds == CUTMIX, device)[:, None, None]
    return torch.where(inside[..., None], second, blended.to(torch.uint8))
