"""Compiled pixel kernels in integer arithmetic. Imported at first use, because importing numba is slow.

Resampling is a separable triangle filter that widens with the scale, like that of Pillow and of torchvision
with `antialias=True`: vertically first, then horizontally, with 13-bit weights and rounding half up after
each pass. The filter reads pixels of the crop only or, with `beyond_crop`, of the whole image. Outside the
image is black.
"""

from __future__ import annotations

import numpy as np
from numba import njit

GRID = 65536
BITS = 13
ONE = 1 << BITS
HALF = 1 << (BITS - 1)

# Three sums of up to 2**13 * 255 + 2**12 fit side by side into 64 bits: one product for three channels.
FIELD = np.uint64(21)
THREE_HALVES = np.uint64(HALF | HALF << 21 | HALF << 42)
SHIFT_0, SHIFT_1, SHIFT_2 = np.uint64(BITS), np.uint64(21 + BITS), np.uint64(42 + BITS)
LEVEL = np.uint64(255)


@njit(cache=True, nogil=True, inline="always")
def _edge(coordinate: int, side: int) -> float:
    """Convert a coordinate in 2**-16 of the side to pixels, exactly if it denotes a whole pixel."""
    exact = coordinate * side / GRID
    whole = np.rint(exact)
    return whole if abs(whole * GRID - coordinate * side) <= side else exact


@njit(cache=True, nogil=True)
def axis_weights(
    start: int,
    length: int,
    side: int,
    out: int,
    flip: bool,
    beyond_crop: bool,
    first: np.ndarray,
    count: np.ndarray,
) -> np.ndarray:
    """Return the weights `(out, taps)` int32 of one axis, for `out` pixels.

    Output pixel i reads pixels `first[i]` to `first[i] + count[i]`; both arrays are written. The weights sum
    to 2**13 over the crop or, with `beyond_crop`, over the whole image. Pixels outside `0..side` are left out
    of the range.
    """
    low, high = _edge(start, side), _edge(start + length, side)
    scale = (high - low) / out
    wide = max(scale, 1.0)
    region_low = int(np.floor(low))
    # A very small box still covers one pixel, also where both of its edges are rounded to the image's last.
    if start < GRID and low == high:
        region_low = min(region_low, side - 1)
    region_high = max(int(np.ceil(high)), region_low + 1)
    if beyond_crop:
        region_low, region_high = 0, side
    taps = min(2 * int(np.ceil(wide)) + 1, region_high - region_low)
    weights = np.zeros((out, taps), np.int32)
    exact = np.empty(taps)
    for i in range(out):
        at = out - 1 - i if flip else i
        center = low + (i + 0.5) * scale
        if beyond_crop and not 0 <= center < side:
            first[at], count[at] = 0, 0
            continue
        begin = max(int(np.floor(center - wide + 0.5)), region_low)
        end = min(int(np.floor(center + wide + 0.5)), region_high)
        total = 0.0
        for t in range(end - begin):
            exact[t] = max(0.0, 1.0 - abs((begin + t - center + 0.5) / wide))
            total += exact[t]
        largest, left = 0, ONE
        for t in range(end - begin):
            weight = int(np.floor(exact[t] / total * ONE + 0.5))
            weights[at, t] = weight
            left -= weight
            if exact[t] > exact[largest]:
                largest = t
        weights[at, largest] += left
        inside_begin, inside_end = max(begin, 0), min(end, side)
        if inside_begin >= inside_end:
            first[at], count[at] = 0, 0
            continue
        shift = inside_begin - begin
        first[at], count[at] = inside_begin, inside_end - inside_begin
        if shift > 0:
            for t in range(inside_end - inside_begin):
                weights[at, t] = weights[at, t + shift]
    return weights


@njit(cache=True, nogil=True)
def axis_taps(
    spans: np.ndarray, flips: np.ndarray, side: int, beyond_crop: bool, begin: np.ndarray, out: np.ndarray
) -> None:
    """Write the weights of spans `(N, 2)` (start, length), all of as many taps, for any device.

    Output pixel i of sample n reads pixels `begin[n, i]` to `begin[n, i] + taps`, all of them inside the
    image, with weights `out[n, i]`.

    Args:
        spans: starts and lengths of the crops on the grid.
        flips: whether a sample is flipped, `(N,)`.
        side: side of the images in pixels.
        beyond_crop: as for `axis_weights`.
        begin: `(N, pixels)` int32.
        out: `(N, pixels, taps)` int16, with at least as many taps as `max_taps` and at most `side`.
    """
    size, taps = out.shape[1:]
    first, count = np.empty(size, np.int64), np.empty(size, np.int64)
    for n in range(len(spans)):
        weights = axis_weights(spans[n, 0], spans[n, 1], side, size, flips[n], beyond_crop, first, count)
        out[n] = 0
        for i in range(size):
            begin[n, i] = max(0, min(first[i], side - taps))
            shift = first[i] - begin[n, i]
            for t in range(min(count[i], taps - shift)):
                out[n, i, shift + t] = weights[i, t]


def max_taps(spans: np.ndarray, side: int, size: int) -> int:
    """Return the largest number of pixels that an output pixel of any span `(N, 2)` reads."""
    # Edges are rounded to whole pixels, by at most side / GRID each.
    widest = (int(spans[:, 1].max(initial=0)) + 2) * side / GRID / size
    return min(side, 2 * int(np.ceil(max(widest, 1.0))) + 1)


@njit(cache=True, nogil=True, inline="always")
def _is_copy(start: int, length: int, side: int, out: int) -> bool:
    low, high = _edge(start, side), _edge(start + length, side)
    return high - low == out and low == np.floor(low)


@njit(cache=True, nogil=True)
def _copy(image: np.ndarray, box: np.ndarray, flip: int, out: np.ndarray) -> None:
    height, width, channels = image.shape
    size = out.shape[0]
    top, left = int(_edge(box[0], height)), int(_edge(box[1], width))
    low, high = max(0, -left), min(size, width - left)
    mirrored = flip & 1 != 0
    begin, end = (size - high, size - low) if mirrored else (low, high)
    source, target = image.reshape(-1), out.reshape(-1)
    for y in range(size):
        # Slices that begin at 0 avoid a check for negative indices at every access.
        at = (size - 1 - y if flip & 2 else y) * size * channels
        row = target[at : at + size * channels]
        if not 0 <= top + y < height or low >= high:
            for k in range(len(row)):
                row[k] = 0
            continue
        for k in range(begin * channels):
            row[k] = 0
        rest = row[end * channels :]
        for k in range(len(rest)):
            rest[k] = 0
        start = ((top + y) * width + left + low) * channels
        source_row = source[start : start + (high - low) * channels]
        target_row = row[begin * channels : end * channels]
        if not mirrored:
            for k in range(len(source_row)):
                target_row[k] = source_row[k]
        elif channels == 3:
            for x in range(high - low):
                other = len(source_row) - 3 - 3 * x
                target_row[3 * x] = source_row[other]
                target_row[3 * x + 1] = source_row[other + 1]
                target_row[3 * x + 2] = source_row[other + 2]
        else:
            for x in range(high - low):
                for c in range(channels):
                    target_row[x * channels + c] = source_row[(high - low - 1 - x) * channels + c]


@njit(cache=True, nogil=True)
def _filter(image: np.ndarray, box: np.ndarray, flip: int, beyond_crop: bool, out: np.ndarray) -> None:
    height, width, channels = image.shape
    size = out.shape[0]
    row_first, row_count = np.empty(size, np.int64), np.empty(size, np.int64)
    first, count = np.empty(size, np.int64), np.empty(size, np.int64)
    row_weights = axis_weights(box[0], box[2], height, size, flip & 2 != 0, beyond_crop, row_first, row_count)
    weights = axis_weights(box[1], box[3], width, size, flip & 1 != 0, beyond_crop, first, count)
    left, right = width, 0
    for x in range(size):
        if count[x] > 0:
            left, right = min(left, first[x]), max(right, first[x] + count[x])
    if left >= right:
        out[:] = 0
        return
    flat = image.reshape(height, width * channels)
    begin, end = left * channels, right * channels
    sums = np.empty(end - begin, np.int32)
    line = np.empty(end - begin, np.uint8)
    packed = np.empty(right - left, np.uint64)
    for y in range(size):
        sums[:] = HALF
        for t in range(row_count[y]):
            weight = row_weights[y, t]
            source = flat[row_first[y] + t, begin:end]
            for k in range(end - begin):
                sums[k] += np.int32(weight * np.int32(source[k]))
        for k in range(end - begin):
            line[k] = np.uint8(sums[k] >> BITS)
        if channels == 3:
            for k in range(right - left):
                green, blue = np.uint64(line[3 * k + 1]) << FIELD, np.uint64(line[3 * k + 2]) << FIELD + FIELD
                packed[k] = np.uint64(line[3 * k]) | green | blue
            for x in range(size):
                three = THREE_HALVES
                offset = first[x] - left
                for t in range(count[x]):
                    three += np.uint64(weights[x, t]) * packed[offset + t]
                out[y, x, 0] = np.uint8(three >> SHIFT_0 & LEVEL)
                out[y, x, 1] = np.uint8(three >> SHIFT_1 & LEVEL)
                out[y, x, 2] = np.uint8(three >> SHIFT_2 & LEVEL)
        else:
            for x in range(size):
                for c in range(channels):
                    total = HALF
                    for t in range(count[x]):
                        total += weights[x, t] * line[(first[x] - left + t) * channels + c]
                    out[y, x, c] = total >> BITS


@njit(cache=True, nogil=True)
def resample(image: np.ndarray, box: np.ndarray, flip: int, beyond_crop: bool, out: np.ndarray) -> None:
    """Resample the crop of one image `(H, W, C)` to `out (S, S, C)` and flip it.

    Bit 1 of `flip` is left-right, bit 2 top-bottom.
    """
    height, width, _ = image.shape
    size = out.shape[0]
    if _is_copy(box[0], box[2], height, size) and _is_copy(box[1], box[3], width, size):
        _copy(image, box, flip, out)
    else:
        _filter(image, box, flip, beyond_crop, out)


@njit(cache=True, nogil=True)
def resample_rows(
    images: np.ndarray,
    samples: np.ndarray,
    boxes: np.ndarray,
    flips: np.ndarray,
    beyond_crop: bool,
    out: np.ndarray,
) -> None:
    """Apply `resample` to the given samples of images `(M, H, W, C)`, into `out (N, S, S, C)`."""
    for n in range(len(samples)):
        resample(images[samples[n]], boxes[n], flips[n], beyond_crop, out[n])


@njit(cache=True, nogil=True)
def normalize_rows(
    images: np.ndarray,
    samples: np.ndarray,
    boxes: np.ndarray,
    flips: np.ndarray,
    beyond_crop: bool,
    channel: np.ndarray,
    table: np.ndarray,
    out: np.ndarray,
) -> None:
    """Resample and map pixels through a table: `out[n, c] = table[c, pixels[..., channel[c]]]`, float32."""
    _, height, width, channels = images.shape
    size = out.shape[2]
    scratch = np.empty((size, size, channels), np.uint8)
    for n in range(len(samples)):
        box, flip = boxes[n], flips[n]
        if not (_is_copy(box[0], box[2], height, size) and _is_copy(box[1], box[3], width, size)):
            _filter(images[samples[n]], box, flip, beyond_crop, scratch)
            for c in range(len(channel)):
                for y in range(size):
                    for x in range(size):
                        out[n, c, y, x] = table[c, scratch[y, x, channel[c]]]
            continue
        top, left = int(_edge(box[0], height)), int(_edge(box[1], width))
        low, high = max(0, -left), min(size, width - left)
        source = images[samples[n]].reshape(-1)
        planes = out[n].reshape(len(channel), -1)
        for y in range(size):
            at = (size - 1 - y if flip & 2 else y) * size
            inside = 0 <= top + y < height and low < high
            if not inside or low > 0 or high < size:
                for c in range(len(channel)):
                    planes[c, at : at + size] = table[c, 0]
            if not inside:
                continue
            line = source[((top + y) * width + left + low) * channels :]
            first, step = (at + size - 1 - low, -1) if flip & 1 else (at + low, 1)
            if channels == len(channel) == 3:
                # The most common case: every pixel is read once.
                for x in range(high - low):
                    index = first + step * x
                    planes[0, index] = table[0, line[3 * x]]
                    planes[1, index] = table[1, line[3 * x + 1]]
                    planes[2, index] = table[2, line[3 * x + 2]]
            else:
                for x in range(high - low):
                    for c in range(len(channel)):
                        planes[c, first + step * x] = table[c, line[x * channels + channel[c]]]


@njit(cache=True, nogil=True)
def blend(
    first: np.ndarray, second: np.ndarray, kinds: np.ndarray, shares: np.ndarray, boxes: np.ndarray
) -> None:
    """Mix `second (N, S, S, C)` into `first`: by share, rounded half up (kind 1), or a box of it (kind 2)."""
    count, size, _, _ = first.shape
    for n in range(count):
        if kinds[n] == 1:
            share, rest = np.int32(shares[n]), np.int32(GRID - shares[n])
            one, other = first[n].reshape(-1), second[n].reshape(-1)
            for k in range(len(one)):
                one[k] = np.uint8((np.int32(one[k]) * share + np.int32(other[k]) * rest + 32768) >> 16)
        elif kinds[n] == 2:
            top, left = (boxes[n, 0] * size + 32768) >> 16, (boxes[n, 1] * size + 32768) >> 16
            bottom = ((boxes[n, 0] + boxes[n, 2]) * size + 32768) >> 16
            right = ((boxes[n, 1] + boxes[n, 3]) * size + 32768) >> 16
            first[n, top:bottom, left:right] = second[n, top:bottom, left:right]
