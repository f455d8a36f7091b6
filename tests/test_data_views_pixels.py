"""Rendered geometry and mixing against float64 and exact references, torchvision, and another device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from helpers import random_source
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference.views import blended, pixel_edge, resized, rounding_bound
from view_cases import RECIPES, Ragged, noisy, one_image, recipe_of, smooth

from coursepack.data import PRESETS
from coursepack.data.batches import Batch
from coursepack.data.jit_pixels import axis_taps, axis_weights, max_taps
from coursepack.data.views import GRID, ViewParams, draw, render, render_on_device
from coursepack.data.views.params import CUTMIX, MIXUP, Mixing
from coursepack.models.preprocessing import Preprocessing

NONE = PRESETS["none"]
ONE = np.array([0])
SHAPES = [(1, 1), (8, 8), (29, 13), (32, 32), (75, 100), (375, 500), (500, 333)]


def rendered(image, box, size, flips=0):
    """One image's crop: box in 2**-16."""
    params = ViewParams(np.array([box], dtype=np.int32), np.array([flips], dtype=np.uint8))
    return render(NONE, one_image(image), ONE, params, size)[0]


def pixel_box(top, left, height, width, shape):
    """A box of whole pixels in 2**-16, as `draw` gives it."""
    low = [top * GRID // shape[0], left * GRID // shape[1]]
    high = [(top + height) * GRID // shape[0], (left + width) * GRID // shape[1]]
    return [*low, high[0] - low[0], high[1] - low[1]]


def tensor(image):
    return torch.from_numpy(image).permute(2, 0, 1)


def array(image):
    return image.permute(1, 2, 0).numpy()


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(*[st.integers(-2 * GRID, 2 * GRID)] * 2, *[st.integers(1, 3 * GRID)] * 2),
    st.integers(1, 40),
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.sampled_from([1, 3]),
    st.integers(0, 3),
)
@example((0, GRID - 1, 1, 1), 1, (1, 1), 1, 0)
def test_any_crop_at_any_size_equals_the_float64_reference(box, size, shape, channels, flips):
    image = noisy(*shape, channels)
    error = np.abs(rendered(image, box, size, flips) - resized(image, box, size, flips))
    assert error.max() <= rounding_bound(image, box, size)


@pytest.mark.parametrize("shape", [(375, 500), (17, 640), (10, 3000)])
def test_strong_shrinking_equals_the_float64_reference(shape):
    image = noisy(*shape)
    for box in ([0, 0, GRID, GRID], [3000, 9000, 50_000, 41_000], [-GRID // 2, GRID // 2, GRID, GRID]):
        for size in (1, 7, 64):
            error = np.abs(rendered(image, box, size) - resized(image, box, size))
            assert error.max() <= min(rounding_bound(image, box, size), 3)


@pytest.mark.parametrize(
    "box", [[0, 0, 1, 1], [GRID // 2, GRID // 2, 1, 1], [GRID, GRID, 1, 1], [-1, 5, 1, GRID]]
)
@pytest.mark.parametrize("side", [1, 32, 70])
def test_a_box_of_hardly_any_extent_shows_the_pixel_it_lies_in(box, side):
    image = noisy(side, side)
    pixels = rendered(image, box, 5)
    assert np.abs(pixels - resized(image, box, 5)).max() <= 1
    if box[2] == box[3] and box[0] < GRID:
        place = box[0] * side // GRID
        # In the middle of a pixel it is that one; on an edge between two it begins the next.
        assert np.abs(pixels.astype(int) - image[place, place]).max() <= 1


def test_outside_is_black():
    image = np.full((9, 9, 3), 255, dtype=np.uint8)
    for box in ([GRID, 0, GRID, GRID], [0, -GRID, GRID, GRID], [-3 * GRID, 5 * GRID, GRID, GRID // 3]):
        assert not rendered(image, box, 12).any()
    half = rendered(image, [0, GRID // 3, GRID, GRID], 9)
    assert (half[:, :6] == 255).all()
    assert not half[:, 6:].any()


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(*[st.integers(0, GRID // 2)] * 2, *[st.integers(1, GRID // 2)] * 2),
    st.integers(1, 50),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.sampled_from([1, 128, 254, 255]),
    st.sampled_from([1, 3]),
)
def test_a_constant_image_stays_constant(box, size, shape, level, channels):
    image = np.full((*shape, channels), level, dtype=np.uint8)
    assert (rendered(image, box, size) == level).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(-GRID, GRID), st.integers(1, 2 * GRID), st.integers(1, 900), st.integers(1, 40))
@example(GRID - 1, 1, 1, 1)
@example(GRID - 1, 1, 900, 3)
def test_weights_sum_to_one_and_flip_exactly(start, length, side, size):
    first, count = np.empty(size, np.int64), np.empty(size, np.int64)
    plain = axis_weights(start, length, side, size, False, False, first, count)
    if start >= 0 and start + length <= GRID:
        assert all(weights[:n].sum() == 8192 for weights, n in zip(plain, count, strict=True))
        assert (first >= 0).all()
        assert (first + count <= side).all()
    mirrored, counted = np.empty(size, np.int64), np.empty(size, np.int64)
    flipped = axis_weights(start, length, side, size, True, False, mirrored, counted)
    assert np.array_equal(mirrored, first[::-1])
    assert np.array_equal(counted, count[::-1])
    for i in range(size):
        assert np.array_equal(flipped[i, : counted[i]], plain[size - 1 - i, : count[size - 1 - i]])


# Integer geometry: exact copies


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [1, 8, 31, 32, 99, 224, 500])
def test_padded_crops_and_flips_are_torchvisions(side, channels):
    image = noisy(side, side, channels)
    padding = min(side, 4)
    recipe = recipe_of(
        ("pad_crop", {"padding": padding}),
        ("horizontal_flip", {}),
        ("vertical_flip", {}),
        reference_size=side,
    )
    samples = np.arange(12)
    source = Ragged((image,) * 12)
    params = draw(recipe, source, samples, 0)
    shifts = np.rint(params.boxes[:, :2] * side / GRID).astype(int)
    assert len({*map(tuple, shifts)}) > 4
    for row, pixels in enumerate(render(recipe, source, samples, params, side)):
        top, left = (shifts[row] + padding).tolist()
        expected = F.crop(F.pad(tensor(image), [padding] * 4), top, left, side, side)
        expected = F.horizontal_flip(expected) if params.flips[row] & 1 else expected
        expected = F.vertical_flip(expected) if params.flips[row] & 2 else expected
        assert np.array_equal(pixels, array(expected))


@pytest.mark.parametrize("size", [1, 5, 24, 32, 33, 50])
@pytest.mark.parametrize("side", [8, 31, 32, 33])
def test_centre_crops_at_native_size_are_torchvisions(side, size):
    image = noisy(side, side)
    recipe = recipe_of(("center_crop", {"size": size}), reference_size=side)
    source = one_image(image)
    pixels = render(recipe, source, ONE, draw(recipe, source, ONE, 0), size)[0]
    assert np.array_equal(pixels, array(F.center_crop(tensor(image), [size])))


@pytest.mark.parametrize("shape", [(32, 32), (100, 75), (375, 500), (500, 333)])
def test_crops_on_whole_pixels_at_their_own_size_are_copies(shape):
    image = noisy(*shape)
    rng = np.random.default_rng(0)
    for _ in range(30):
        size = int(rng.integers(1, min(shape) + 1))
        top, left = (int(rng.integers(0, side - size + 1)) for side in shape)
        found = rendered(image, pixel_box(top, left, size, size, shape), size)
        assert np.array_equal(found, image[top : top + size, left : left + size])


# Resampling beside torchvision's


@pytest.mark.parametrize("make", [noisy, smooth])
@pytest.mark.parametrize("shape", SHAPES)
def test_resized_crops_are_within_one_level_of_torchvisions(make, shape):
    image, rng = make(*shape), np.random.default_rng(1)
    for size in (8, 32, 160, 224):
        for _ in range(4):
            extent = [int(rng.integers(1, side + 1)) for side in shape]
            start = [int(rng.integers(0, side - n + 1)) for side, n in zip(shape, extent, strict=True)]
            expected = array(F.resized_crop(tensor(image), *start, *extent, [size, size], antialias=True))
            found = rendered(image, pixel_box(*start, *extent, shape), size)
            assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("make", [noisy, smooth])
@pytest.mark.parametrize("shape", [(256, 256), (375, 500), (500, 333), (100, 75), (224, 224), (32, 32)])
def test_eval_views_are_within_two_levels_of_resize_and_centre_crop(make, shape):
    # A longer side that 256 does not divide moves the grid by under half a pixel of the frame.
    image = make(*shape)
    source = one_image(image)
    found = render(PRESETS["eval"], source, ONE, draw(PRESETS["eval"], source, ONE, 0), 224)[0].astype(int)
    expected = array(F.center_crop(F.resize(tensor(image), [256], antialias=True), [224]))
    error = np.abs(found - expected)
    assert error.max() <= 2
    assert error.mean() < 0.5
    if shape == (256, 256):
        assert error.max() == 0


def test_one_view_at_two_sizes_covers_the_same_box():
    # A ramp shows where each pixel was taken from.
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 256, axis=0)
    source = Ragged((ramp,) * 40)
    recipe = RECIPES["imagenet"]
    params = draw(recipe, source, np.arange(40), 0)
    large, small = (render(recipe, source, np.arange(40), params, size).astype(float) for size in (96, 48))
    halved = large.reshape(40, 48, 2, 48, 2, 1).mean(axis=(2, 4))
    assert np.abs(halved - small)[:, :, 2:-2].max() <= 1.5
    assert len(np.unique(params.boxes[:, 1])) > 20


# Mixing


@settings(max_examples=40, deadline=None)
@given(st.integers(0, GRID), st.integers(1, 12), st.sampled_from([1, 3]), st.integers(0, 99))
def test_mixup_rounds_half_up_once(share, size, channels, seed):
    source = random_source(2, size=size, channels=channels, seed=seed)
    first, second = source.images
    pixels = mixed(source, MIXUP, share, [0, 0, 0, 0], size)
    assert np.array_equal(pixels, blended(first, second, share))


def mixed(source, kind, share, box, size):
    """Sample 0 of a source mixed with sample 1."""
    whole = ViewParams(np.array([[0, 0, GRID, GRID]], dtype=np.int32))
    box, share = np.array([box], dtype=np.int32), np.array([share], dtype=np.int32)
    mixing = Mixing(np.array([kind], dtype=np.uint8), np.array([1]), share, box, whole)
    params = ViewParams(whole.boxes, mixing=mixing)
    pixels = render(NONE, source, ONE, params, size)[0]
    device = render_on_device(NONE, torch.from_numpy(source.images), ONE, params, size)[0]
    assert np.array_equal(device.numpy(), pixels)
    return pixels


def test_mixup_of_every_two_levels_is_exact():
    levels = np.arange(256, dtype=np.uint8)
    pair = np.stack([np.tile(levels[:, None], (1, 256)), np.tile(levels, (256, 1))])[..., None]
    source = type(random_source(1))("levels:train", pair, np.zeros(2, dtype=np.int64), ("a",))
    for share in (0, 1, 128, 129, 255, 256, 16384, 21845, 32768, 32769, 65408, 65535, GRID):
        pixels = mixed(source, MIXUP, share, [0, 0, 0, 0], 256)
        assert np.array_equal(pixels, blended(*pair, share)), share


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, GRID), min_size=4, max_size=4), st.integers(1, 40))
def test_cutmix_puts_the_box_on_rounded_pixels(edges, size):
    (top, bottom), (left, right) = sorted(edges[:2]), sorted(edges[2:])
    source = random_source(2, size=size, channels=3)
    pixels = mixed(source, CUTMIX, 0, [top, left, bottom - top, right - left], size)
    expected = source.images[0].copy()
    rows = slice(pixel_edge(top, size), pixel_edge(bottom, size))
    across = slice(pixel_edge(left, size), pixel_edge(right, size))
    expected[rows, across] = source.images[1][rows, across]
    assert np.array_equal(pixels, expected)


def test_mixed_views_are_blends_of_unmixed_ones():
    source = random_source(50, size=32, channels=3)
    for name in ("mixup", "cutmix", "switch", "cifar-strong"):
        recipe = RECIPES[name]
        params = draw(recipe, source, np.arange(20), 0)
        mixing = params.mixing
        plain = recipe.model_copy(update={"mix": None})
        every = render(plain, source, np.arange(50), draw(plain, source, np.arange(50), 0), 24)
        for row, pixels in enumerate(render(recipe, source, np.arange(20), params, 24)):
            expected = every[row].copy()
            if mixing.kinds[row] == MIXUP:
                expected = blended(expected, every[mixing.partners[row]], mixing.shares[row])
            elif mixing.kinds[row] == CUTMIX:
                top, left, height, width = mixing.boxes[row]
                rows = slice(pixel_edge(top, 24), pixel_edge(top + height, 24))
                across = slice(pixel_edge(left, 24), pixel_edge(left + width, 24))
                expected[rows, across] = every[mixing.partners[row]][rows, across]
            assert np.array_equal(pixels, expected)


# Threads, sources and devices


@pytest.mark.parametrize("name", ["imagenet-strong", "cifar", "switch"])
def test_threads_and_kinds_of_source_change_nothing(name):
    source, samples = random_source(30, size=20, channels=3), np.array([3, 29, 4, 4, 11])
    ragged = Ragged(tuple(source.images))
    params = draw(RECIPES[name], source, samples, 1)
    expected = render(RECIPES[name], source, samples, params, 17)
    for other, threads in ((source, 3), (ragged, 1), (ragged, 8)):
        found = render(RECIPES[name], other, samples, params, 17, threads=threads)
        assert np.array_equal(found, expected)
    for row in range(5):
        alone = render(RECIPES[name], source, samples[row : row + 1], params[row : row + 1], 17)
        assert np.array_equal(alone[0], expected[row])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [*PRESETS, "crops of crops", "switch"])
def test_rendering_on_a_device_equals_the_cpus(name, channels):
    source, samples, recipe = random_source(40, size=30, channels=channels), np.arange(16), RECIPES[name]
    params = draw(recipe, source, samples, 2)
    for size in (30, 7, 48):
        expected = render(recipe, source, samples, params, size)
        found = render_on_device(recipe, torch.from_numpy(source.images), samples, params, size)
        assert np.array_equal(found.numpy(), expected)


def test_weights_for_a_device_are_those_of_the_cpu():
    rng = np.random.default_rng(0)
    for trial in range(60):
        side, size, beyond_crop = int(rng.integers(1, 90)), int(rng.integers(1, 60)), bool(trial % 2)
        starts, lengths = rng.integers(-GRID // 2, GRID + 1, 8), rng.integers(0, 2 * GRID, 8)
        spans, flips = np.stack([starts, lengths], 1).astype(np.int32), rng.integers(0, 2, 8).astype(bool)
        taps = max_taps(spans, side, size)
        begin, weights = np.empty((8, size), np.int32), np.empty((8, size, taps), np.int16)
        axis_taps(spans, flips, side, beyond_crop, begin, weights)
        assert begin.min() >= 0
        assert begin.max() + taps <= side
        first, count = np.empty(size, np.int64), np.empty(size, np.int64)
        for row, (start, length) in enumerate(spans):
            own = axis_weights(start, length, side, size, flips[row], beyond_crop, first, count)
            for pixel in range(size):
                found, expected = np.zeros(side), np.zeros(side)
                found[begin[row, pixel] :][:taps] = weights[row, pixel]
                expected[first[pixel] :][: count[pixel]] = own[pixel, : count[pixel]]
                assert np.array_equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*PRESETS, "crops of crops", "switch"])
def test_rendering_on_a_gpu_is_within_one_level_of_the_cpus(name):
    source, samples, recipe = random_source(40, size=30, channels=3), np.arange(16), RECIPES[name]
    params = draw(recipe, source, samples, 2)
    images = torch.from_numpy(source.images).cuda()
    for size in (30, 7, 48):
        expected = render(recipe, source, samples, params, size)
        found = render_on_device(recipe, images, samples, params, size).cpu().numpy()
        assert np.abs(found.astype(int) - expected).max() <= (1 if recipe.pixel_ops else 0)


# Normalisation in the same pass


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["none", "eval", "cifar", "imagenet", "cifar-strong"])
@pytest.mark.parametrize("size", [20, 32])
def test_normalised_batches_are_their_pixels_normalised(name, size, channels):
    source, samples = random_source(40, size=32, channels=channels), np.arange(40)[::-1].copy()
    preprocessing = Preprocessing(size=size, mean=(0.5, 0.4, 0.3)[:channels], std=(0.2, 0.25, 0.3)[:channels])
    views = np.arange(40) % 3
    expected = preprocessing(Batch(source, PRESETS[name], samples, views).pixels(size))
    batch = Batch(source, PRESETS[name], samples, views)
    assert torch.equal(batch.normalized(size, *preprocessing.levels(channels)), expected)
    wide = Preprocessing(size=size, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    found = batch.normalized(size, *wide.levels(channels))
    assert torch.equal(found, wide(batch.pixels(size)))
