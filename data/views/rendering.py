"""Rendering of drawn parameters to uint8 pixels of any size, on the CPU or on a GPU that holds the images.

On the CPU, geometry and mixing are compiled kernels in integer arithmetic. On a GPU the same integers go
through matrix products in float64, which represents them exactly, so both devices give the same pixels. Ops
on rendered pixels call torchvision on both.
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
    """Render samples under drawn parameters to pixels `(N, size, size, channels)`.

    Args:
        recipe: view recipe from which the parameters were drawn.
        source: source of the images.
        samples: sample indices `(N,)`.
        params: view parameters of these samples, from `draw`.
        size: side in pixels.
        threads: number of threads that resample.

    Raises:
        SourceError: an image cannot be decoded.
        RecipeError: the user's own pipeline returns anything but uint8 pixels of this size.
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


def render_normalized(
    recipe: ViewRecipe,
    source: Source,
    samples: Samples,
    params: ViewParams,
    size: int,
    channel: Sequence[int],
    table: NDArray[np.float32],
) -> NDArray[np.float32] | None:
    """Render and map pixel values through a table in one pass, to a network's input `(N, channels, S, S)`.

    Args:
        recipe, source, samples, params, size: as for `render`.
        channel: for each input channel of the network, the index of the source's channel.
        table: `(channels, 256)`, the network's input for each pixel value.

    Returns:
        None for views that take more than one pass: image files, mixing, and ops on rendered pixels.
    """
    if source.in_memory is None or params.mixing is not None or params.pixel_ops:
        return None
    from coursepack.data.jit_pixels import normalize_rows

    _check_samples(source.in_memory, samples)
    flips = np.zeros(len(samples), np.uint8) if params.flips is None else params.flips
    out = np.empty((len(samples), len(channel), size, size), np.float32)
    beyond_crop = recipe.filters_before_cropping
    normalize_rows(
        source.in_memory, samples, params.boxes, flips, beyond_crop, np.asarray(channel), table, out
    )
    return out


def _check_samples(whole: NDArray[np.uint8], samples: Samples) -> None:
    """Raise IndexError for invalid indices, as the compiled kernels do no bounds checks."""
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
    images = source.pixels(samples) if source.in_memory is None else None
    beyond_crop = recipe.filters_before_cropping
    if source.in_memory is not None:
        _check_samples(source.in_memory, samples)

    def resample_slice(rows: slice) -> None:
        if source.in_memory is not None:
            resample_rows(
                source.in_memory, samples[rows], params.boxes[rows], flips[rows], beyond_crop, out[rows]
            )
        elif images is not None:
            for n in range(*rows.indices(len(samples))):
                resample(images[n], params.boxes[n], flips[n], beyond_crop, out[n])

    if threads == 1:
        resample_slice(slice(None))
        return
    share = -(-len(samples) // threads)
    with ThreadPoolExecutor(threads) as pool:
        list(
            pool.map(resample_slice, [slice(start, start + share) for start in range(0, len(samples), share)])
        )


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
    """Render images that are on a device, there.

    Args:
        recipe: view recipe from which the parameters were drawn; not a pipeline.
        images: the source's `in_memory`, `(M, H, W, C)` uint8 on the device.
        samples: sample indices `(N,)`.
        params: view parameters of these samples, from `draw`.
        size: side in pixels.

    Returns:
        `(N, size, size, channels)` uint8 on the device. Resampled and mixed pixels equal those of `render`;
            pixels changed by torchvision's functions differ by at most one level.
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
    from coursepack.device import to_device

    flips = np.zeros(len(samples), np.uint8) if params.flips is None else params.flips
    _, height, width, channels = images.shape
    beyond_crop = recipe.filters_before_cropping
    device = images.device
    rows = _matrices(params.boxes[:, 0::2], height, size, flips & UPSIDE_DOWN > 0, beyond_crop, device)
    columns = _matrices(params.boxes[:, 1::2], width, size, flips & MIRRORED > 0, beyond_crop, device)
    chosen = images[to_device(samples, device)].double()
    half, one = float(HALF), float(ONE)
    # Not float32: the user may have allowed TF32 or bfloat16 products for it.
    tall = torch.bmm(rows, chosen.reshape(len(samples), height, width * channels))
    tall = ((tall + half) / one).floor_().reshape(len(samples), size, width, channels)
    wide = torch.einsum("nxw,nywc->nyxc", columns, tall)
    pixels = ((wide + half) / one).floor_().to(torch.uint8)
    if recipe.pixel_ops:
        _change_pixels(recipe, params, pixels)
    return pixels


def _matrices(
    spans: NDArray[np.int32],
    side: int,
    size: int,
    flips: NDArray[np.bool_],
    beyond_crop: bool,
    device: torch.device,
) -> Tensor:
    """Return the resampling weights of one axis as matrices `(N, size, side)` float64 on a device.

    The weights are copied there without the zeros, which are most of a matrix.
    """
    import torch

    from coursepack.data.jit_pixels import axis_taps, max_taps
    from coursepack.device import to_device

    spans = np.ascontiguousarray(spans)
    shape = (len(spans), size, max_taps(spans, side, size))
    begin, weights = np.empty(shape[:2], np.int32), np.empty(shape, np.int16)
    axis_taps(spans, flips, side, beyond_crop, begin, weights)
    pixels = to_device(begin, device).long()[:, :, None] + torch.arange(shape[2], device=device)
    matrices = torch.zeros((*shape[:2], side), dtype=torch.float64, device=device)
    return matrices.scatter_(2, pixels, to_device(weights, device).double())


def _blend_on_device(first: Tensor, second: Tensor, mixing: Mixing) -> Tensor:
    import torch

    from coursepack.device import to_device

    size, device = first.shape[1], first.device
    shares = np.where(mixing.kinds == MIXUP, mixing.shares, GRID)
    share = to_device(shares, device).to(torch.int32)[:, None, None, None]
    blended = (first.int() * share + second.int() * (GRID - share) + GRID // 2) >> 16
    edges = mixing.boxes.astype(np.int64)
    edges[:, 2:] += edges[:, :2]
    top, left, bottom, right = to_device((edges * size + GRID // 2) >> 16, device)[:, :, None].unbind(1)
    position = torch.arange(size, device=device)
    inside = ((position >= top) & (position < bottom))[:, :, None] & (
        (position >= left) & (position < right)
    )[:, None]
    inside &= to_device(mixing.kinds == CUTMIX, device)[:, None, None]
    return torch.where(inside[..., None], second, blended.to(torch.uint8))
