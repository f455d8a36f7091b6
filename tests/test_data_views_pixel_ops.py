"""Ops on rendered pixels equal torchvision's functions and policies exactly, for the same parameters."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.views import pixel_edge
from scipy.stats import chisquare
from torchvision.transforms import v2
from view_cases import OPS, noisy, one_image, only_op, recipe_of, smooth

from coursepack.data.randomness import Draws
from coursepack.data.views import GRID, draw, render
from coursepack.data.views.policies import _MODERATE, KINDS, Strengths, take_step

MODES = {"nearest": F.InterpolationMode.NEAREST, "bilinear": F.InterpolationMode.BILINEAR}
SIZES = [(1, 3), (8, 1), (32, 3), (41, 3)]
CLASSES = {
    "rand_augment": v2.RandAugment,
    "trivial_augment_wide": v2.TrivialAugmentWide,
    "auto_augment": v2.AutoAugment,
    "aug_mix": v2.AugMix,
}
THEIR_NAMES = {name.lower(): name for name in v2.RandAugment._AUGMENTATION_SPACE} | {"invert": "Invert"}


def image_of(size, channels=3, seed=0):
    return torch.from_numpy(
        smooth(size, size, channels, seed) // 2 + noisy(size, size, channels, seed) // 2
    ).permute(2, 0, 1)


def half_up(value):
    return math.floor(value + 0.5)


def color_jitter(image, op, values, reference):
    active, order, *factors = values
    names = ("brightness", "contrast", "saturation", "hue")
    for place in list(permutations(range(4)))[order]:
        if active and getattr(op, names[place]) > 0:
            image = getattr(F, f"adjust_{names[place]}")(image, factors[place] / GRID)
    return image


def blur(image, op, values, reference):
    size = image.shape[-1]
    reach = min(half_up(op.kernel_size // 2 * size / reference), size - 1)
    sigma = values[1] / GRID * size / reference
    return F.gaussian_blur(image, 2 * reach + 1, sigma) if values[0] else image


def rotation(image, op, values, reference):
    return F.rotate(image, values[0] / GRID, MODES[op.interpolation], fill=op.fill)


def affine(image, op, values, reference):
    turn, right, down, scale, *shear = (value / GRID for value in values)
    shift = [half_up(share * image.shape[-1]) for share in (right, down)]
    return F.affine(image, turn, shift, scale, shear, MODES[op.interpolation], fill=op.fill)


def erasing(image, op, values, reference):
    top, left, height, width = values[:4]
    size = image.shape[-1]
    top, bottom, left, right = (pixel_edge(e, size) for e in (top, top + height, left, left + width))
    value = torch.tensor(op.value, dtype=torch.uint8)
    return (
        F.erase(image, top, left, bottom - top, right - left, value)
        if bottom > top and right > left
        else image
    )


def chain(image, steps, policy):
    """torchvision's own policy takes the same steps."""
    for kind, magnitude in zip(steps[::2], steps[1::2], strict=True):
        image = their_step(policy, image, KINDS[kind], magnitude / GRID)
    return image


def their_step(policy, image, kind, value):
    if kind.startswith("translate"):
        value = math.copysign(math.floor(abs(value) * image.shape[-1] + 1e-3), value)
    name = THEIR_NAMES[kind.replace("_", "")]
    return policy._apply_image_or_video_transform(image, name, value, policy.interpolation, policy._fill)


def policy_of(op):
    return CLASSES[op.op](interpolation=MODES[op.interpolation], fill=op.fill)


def aug_mix(image, op, values, reference):
    weights, steps = values[: 1 + op.mixture_width], values[1 + op.mixture_width :]
    length = len(steps) // op.mixture_width
    total = image.numpy().astype(object) * weights[0]
    for k, weight in enumerate(weights[1:]):
        changed = chain(image, steps[k * length : (k + 1) * length], policy_of(op))
        total = total + changed.numpy().astype(object) * weight
    return torch.from_numpy((total // GRID).astype(np.uint8))


def grayscale(image, op, values, reference):
    return F.rgb_to_grayscale(image, len(image)) if values[0] else image


def solarize(image, op, values, reference):
    return F.solarize(image, op.threshold) if values[0] else image


def posterize(image, op, values, reference):
    return F.posterize(image, op.bits) if values[0] else image


def policy(image, op, values, reference):
    return chain(image, values, policy_of(op))


EXPECTED = {
    "color_jitter": color_jitter,
    "grayscale": grayscale,
    "blur": blur,
    "solarize": solarize,
    "posterize": posterize,
    "rotation": rotation,
    "affine": affine,
    "rand_augment": policy,
    "trivial_augment_wide": policy,
    "auto_augment": policy,
    "aug_mix": aug_mix,
    "random_erasing": erasing,
}
"""What torchvision gives for an image `(C, S, S)` under drawn integers, for each op."""
CASES = [(name, options) for name in EXPECTED for options in OPS[name] if options.get("value") != "noise"]


def test_every_op_on_pixels_is_compared():
    assert set(OPS) == set(EXPECTED) | {op for op in OPS if "crop" in op or "flip" in op or op == "resize"}


@pytest.mark.parametrize(("size", "channels"), SIZES)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_pixels_are_torchvisions(name, options, size, channels):
    op = only_op(name, **options)
    drawn = op.draw(Draws(4, np.arange(12), 1, 16), 32)
    changed = 0
    for row, values in enumerate(drawn.tolist()):
        image = image_of(size, channels, seed=row)
        before = image.clone()
        found = op.apply(image, values, 32)
        assert torch.equal(found, EXPECTED[name](image, op, values, 32))
        assert torch.equal(image, before)
        assert found.dtype == torch.uint8
        changed += not torch.equal(found, image)
    assert changed > 1 or size == 1 or channels == 1


def test_ops_are_applied_in_order_to_the_rendered_crop():
    image = noisy(40, 40)
    source, one = one_image(image), np.array([0])
    ops = [
        ("horizontal_flip", {"probability": 1.0}),
        ("solarize", {"probability": 1.0}),
        ("posterize", {"bits": 2, "probability": 1.0}),
    ]
    found = render(recipe := recipe_of(*ops), source, one, draw(recipe, source, one, 0), 40)[0]
    expected = F.posterize(F.solarize(F.horizontal_flip(torch.from_numpy(image).permute(2, 0, 1)), 128.0), 2)
    assert np.array_equal(found, expected.permute(1, 2, 0).numpy())
    assert np.array_equal(source.images[0], image)


SPACES = [
    (v2.RandAugment._AUGMENTATION_SPACE, _MODERATE, 31),
    (v2.RandAugment._AUGMENTATION_SPACE, _MODERATE, 9),
    (v2.AutoAugment._AUGMENTATION_SPACE, _MODERATE, 10),
    (v2.TrivialAugmentWide._AUGMENTATION_SPACE, None, 31),
    (v2.AugMix._AUGMENTATION_SPACE, Strengths(0.3, 1 / 3, 30.0, 0.9, (4, 4)), 10),
]


@pytest.mark.parametrize(("space", "strengths", "bins"), SPACES)
@pytest.mark.parametrize("side", [8, 32, 331])
def test_magnitudes_are_torchvisions_to_half_a_step(space, strengths, bins, side):
    strengths = strengths or Strengths(0.99, 32 / side, 135.0, 0.99, (8, 6))
    table = strengths.table(bins)
    policy = v2.RandAugment()
    image = torch.from_numpy(noisy(side, side)).permute(2, 0, 1)
    for name, (magnitudes, _) in space.items():
        theirs = magnitudes(bins, side, side)
        kind = next(place for place, own in enumerate(KINDS) if own.replace("_", "") == name.lower())
        if theirs is None:
            assert not table[kind].any()
            continue
        ours = table[kind] / GRID * (side if name.startswith("Translate") else 1)
        slack = side if name.startswith("Translate") else 1
        assert np.abs(ours - theirs.numpy().astype(float)).max() <= slack / GRID / 2 + 1e-5
        if not name.startswith("Translate") or side > 32:
            continue
        # A shift of a whole number of pixels is that, whatever float32 makes of it.
        for place, value in list(enumerate(theirs.tolist()))[:: 1 + bins // 10]:
            for sign in (1, -1):
                step = take_step(image, kind, sign * int(table[kind, place]), "nearest", 0)
                expected = policy._apply_image_or_video_transform(
                    image,
                    name,
                    math.copysign(math.floor(value + 1e-3), sign),
                    policy.interpolation,
                    policy._fill,
                )
                assert torch.equal(step, expected)


@pytest.mark.parametrize("bins", [10, 31])
def test_solarize_turns_around_the_levels_that_torchvisions_does(bins):
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    table = _MODERATE.table(bins)[KINDS.index("solarize")]
    for own, theirs in zip(table.tolist(), torch.linspace(1.0, 0.0, bins).tolist(), strict=True):
        found = take_step(levels, KINDS.index("solarize"), own, "nearest", 0)
        # A threshold on a whole level is a matter of the last bit on both sides.
        sure = (levels - 255.0 * theirs).abs() > 255 / GRID
        assert torch.equal(found[sure], F.solarize(levels, 255.0 * theirs)[sure])
        assert sure.sum() >= 255


def test_shifts_are_cut_off_towards_zero():
    image = torch.arange(1, 101, dtype=torch.uint8).reshape(1, 1, 100).expand(1, 100, 100)
    kind = KINDS.index("translate_x")
    for pixels, shift in ((3.0, 3), (3.9, 3), (-3.9, -3), (0.99, 0), (-0.99, 0), (-4.0, -4), (50.0, 50)):
        found = take_step(image, kind, round(pixels * GRID / 100), "nearest", 0)
        expected = torch.zeros_like(image)
        if shift >= 0:
            expected[..., shift:] = image[..., : 100 - shift]
        else:
            expected[..., :shift] = image[..., -shift:]
        assert torch.equal(found, expected), pixels


def test_lengths_in_pixels_scale_from_the_reference_frame():
    # An impulse blurred at twice the frame is twice as wide; one erased box covers the same share.
    widths = []
    for size in (64, 128):
        image = torch.zeros(1, size, size, dtype=torch.uint8)
        image[0, size // 2 - size // 64 : size // 2, size // 2 - size // 64 : size // 2] = 255
        op = only_op("blur", kernel_size=31, sigma=(3.0, 3.0), probability=1.0)
        found = op.apply(image, [1, 3 * GRID], 64).double().sum(dim=1)[0]
        place = torch.arange(size).double()
        middle = (found * place).sum() / found.sum()
        widths.append(float(((found * (place - middle) ** 2).sum() / found.sum()).sqrt()))
    assert widths[1] / widths[0] == pytest.approx(2, rel=0.05)


# Erasing


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.lists(st.integers(0, GRID), min_size=4, max_size=4), st.booleans())
def test_erasing_covers_the_box_on_rounded_pixels_and_nothing_else(size, edges, noise):
    (top, bottom), (left, right) = sorted(edges[:2]), sorted(edges[2:])
    op = only_op("random_erasing", value="noise" if noise else 7)
    image = image_of(size)
    found = op.apply(image, [top, left, bottom - top, right - left, *([3, -5] if noise else [])], 32)
    inside = torch.zeros(size, size, dtype=torch.bool)
    inside[
        pixel_edge(top, size) : pixel_edge(bottom, size), pixel_edge(left, size) : pixel_edge(right, size)
    ] = 1
    assert torch.equal(found[:, ~inside], image[:, ~inside])
    if not noise:
        assert (found[:, inside] == 7).all()


def test_noise_is_of_its_own_row_even_and_the_same_again():
    op = only_op("random_erasing", value="noise", probability=1.0)
    drawn = op.draw(Draws(0, np.arange(60), 0, 16), 32).tolist()
    black = torch.zeros(3, 64, 64, dtype=torch.uint8)
    once, again = ([op.apply(black, values, 32) for values in drawn] for _ in range(2))
    assert all(torch.equal(first, second) for first, second in zip(once, again, strict=True))
    # With the same box, other keys give other noise, and every byte is as likely in every channel.
    box = [0, 0, GRID, GRID]
    noise = np.stack([op.apply(black, [*box, *values[4:]], 32).numpy() for values in drawn])
    for channel in range(3):
        assert chisquare(np.bincount(noise[:, channel].reshape(-1), minlength=256)).pvalue > 1e-3
    one_word_apart = [op.apply(black, [*box, *key], 32) for key in ((1, 2), (3, 2), (1, -2))]
    assert len({image.numpy().tobytes() for image in one_word_apart}) == 3
    flat = noise.reshape(60, -1).astype(float)
    correlation = np.corrcoef(flat) - np.eye(60)
    assert np.abs(correlation).max() < 5 / np.sqrt(flat.shape[1])
    channels = np.corrcoef(noise.transpose(1, 0, 2, 3).reshape(3, -1)) - np.eye(3)
    assert np.abs(channels).max() < 0.02
    neighbours = np.corrcoef(flat[:, 1:].reshape(-1), flat[:, :-1].reshape(-1))[0, 1]
    assert abs(neighbours) < 0.01


def test_nothing_is_erased_where_the_chance_says_so():
    op = only_op("random_erasing", probability=0.0)
    assert not op.draw(Draws(0, np.arange(50), 0, 16), 32).any()
    image = image_of(9)
    assert op.apply(image, [0, 0, 0, 0], 32) is image
