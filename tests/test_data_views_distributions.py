"""Two-sample tests of what ops draw against torchvision's own transforms v2: every seed is fixed."""

from __future__ import annotations

import functools
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.stats import beta, chi2_contingency, chisquare, ks_2samp
from torchvision.transforms import v2
from torchvision.transforms.v2 import AutoAugmentPolicy
from view_cases import Sized, only_op, recipe_of

from coursepack.data.randomness import Draws
from coursepack.data.views import GRID, draw
from coursepack.data.views.mixing import Mix
from coursepack.data.views.params import CUTMIX, MIXUP
from coursepack.data.views.policies import KINDS

DRAWN = 20_000
THEIRS = 4_000
LEAST = 1e-3
"""p-values below this fail. All draws are deterministic, so a test that passes always does."""


def params_of(name, *, count=DRAWN, reference_size=32, **options):
    """What one op draws, as shares `(N, P)` in float64."""
    op = only_op(name, **options)
    return op.draw(Draws(11, np.arange(count), 3, 16), reference_size) / GRID


def theirs(transform, height=32, width=32, count=THEIRS):
    """What torchvision's transform draws for images of a size."""
    image = torch.empty(1, 1, 1).expand(3, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        return [transform.make_params([image]) for _ in range(count)]


def assert_same(ours, other):
    """Values of one distribution, by Kolmogorov and Smirnov."""
    assert ks_2samp(ours, other).pvalue > LEAST


def assert_same_counts(ours, other):
    """Values of few kinds in equal shares, by chi square; kinds seldom seen are taken together."""
    kinds = np.unique(np.concatenate([ours, other]), axis=0)
    table = np.array([[(values == kind).sum() for kind in kinds] for values in (ours, other)])
    rare = table.sum(axis=0) < 30
    if rare.any():
        table = np.concatenate([table[:, ~rare], table[:, rare].sum(axis=1, keepdims=True)], axis=1)
    assert chi2_contingency(table).pvalue > LEAST


CROPS = [
    # Height, width, scale, ratio. The last few seldom or never fit, and take the middle.
    (32, 32, (0.08, 1.0), (3 / 4, 4 / 3)),
    (375, 500, (0.08, 1.0), (3 / 4, 4 / 3)),
    (640, 17, (0.08, 1.0), (3 / 4, 4 / 3)),
    (50, 200, (0.25, 0.8), (0.5, 2.0)),
    (200, 50, (0.9, 1.0), (1.0, 1.0)),
    (20, 1000, (0.5, 1.0), (3 / 4, 4 / 3)),
    (1000, 20, (0.02, 1.0), (3 / 4, 4 / 3)),
    (30, 60, (0.9, 1.0), (1.9, 3.0)),
    (1, 1, (0.08, 1.0), (3 / 4, 4 / 3)),
    (3, 2, (0.08, 1.0), (0.1, 9.0)),
]


@pytest.mark.parametrize(("height", "width", "scale", "ratio"), CROPS)
def test_boxes_of_resized_crops(height, width, scale, ratio):
    recipe = recipe_of(("resized_crop", {"scale": scale, "ratio": ratio}), seed=1)
    boxes = draw(recipe, Sized(fixed=(height, width)), np.arange(DRAWN), 0).boxes
    pixels = boxes * np.array([height, width, height, width]) / GRID
    ours = np.rint(pixels).astype(int)
    assert abs(pixels - ours).max() <= 2 * max(height, width) / GRID
    transform = v2.RandomResizedCrop(1, scale=scale, ratio=ratio)
    found = theirs(transform, height, width)
    other = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in found])
    for axis in range(4):
        assert_same(ours[:, axis], other[:, axis])
    assert_same(ours[:, 2] * ours[:, 3], other[:, 2] * other[:, 3])
    assert_same(ours[:, 3] / ours[:, 2], other[:, 3] / other[:, 2])
    # Where there is room for it.
    assert_same(ours[:, 0] + ours[:, 2], other[:, 0] + other[:, 2])
    assert_same(ours[:, 1] + ours[:, 3], other[:, 1] + other[:, 3])
    assert ((ours[:, :2] >= 0) & (ours[:, 2:] > 0)).all()
    assert (ours[:, :2] + ours[:, 2:] <= [height, width]).all()


@pytest.mark.parametrize(("height", "width"), [(20, 1000), (1000, 20), (7, 300)])
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (0.9, 0.95), (1.5, 2.5)])
def test_crops_that_never_fit_take_torchvisions_middle(height, width, ratio):
    recipe = recipe_of(("resized_crop", {"scale": (1.0, 1.0), "ratio": ratio}))
    boxes = draw(recipe, Sized(fixed=(height, width)), np.arange(5), 0).boxes
    found = theirs(v2.RandomResizedCrop(1, scale=(1.0, 1.0), ratio=ratio), height, width, 3)[0]
    expected = [found["top"], found["left"], found["height"], found["width"]]
    assert (np.rint(boxes * np.array([height, width] * 2) / GRID) == expected).all()


@pytest.mark.parametrize("padding", [1, 4])
def test_shifts_of_padded_crops(padding):
    recipe = recipe_of(("pad_crop", {"padding": padding}), seed=2)
    boxes = draw(recipe, Sized(fixed=(32, 32)), np.arange(DRAWN), 0).boxes
    found = theirs(v2.RandomCrop(32, padding=padding))
    other = np.array([[p["top"], p["left"]] for p in found]) - padding
    ours = boxes[:, :2] * 32 // GRID
    assert np.array_equal(np.unique(ours), np.arange(-padding, padding + 1))
    for axis in range(2):
        assert_same_counts(ours[:, axis], other[:, axis])
        assert chisquare(np.bincount(ours[:, axis] + padding)).pvalue > LEAST
    assert_same_counts(ours[:, 0] * 100 + ours[:, 1], other[:, 0] * 100 + other[:, 1])


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(
    "name", ["horizontal_flip", "vertical_flip", "grayscale", "solarize", "posterize", "blur"]
)
def test_probabilities(name, probability):
    if name.endswith("flip"):
        recipe = recipe_of((name, {"probability": probability}))
        taken = draw(recipe, Sized(fixed=(8, 8)), np.arange(DRAWN), 0).flips > 0
    else:
        taken = params_of(name, probability=probability)[:, 0] > 0
    error = np.sqrt(probability * (1 - probability) / DRAWN)
    assert abs(taken.mean() - probability) <= 3.5 * error


@pytest.mark.parametrize("strength", [0.4, 1.0, 2.0])
def test_factors_and_order_of_color_jitter(strength):
    options = {"brightness": strength, "contrast": strength / 2, "saturation": 0.3, "hue": 0.2}
    ours = params_of("color_jitter", **options)
    found = theirs(v2.ColorJitter(**options))
    names = ("brightness", "contrast", "saturation", "hue")
    for place, name in enumerate(names):
        assert_same(ours[:, 2 + place], [p[f"{name}_factor"] for p in found])
    orders = list(permutations(range(4)))
    other = np.array([orders.index(tuple(p["fn_idx"].tolist())) for p in found])
    assert_same_counts((ours[:, 1] * GRID).astype(int), other)


def test_angles_of_rotation():
    found = theirs(v2.RandomRotation(37))
    assert_same(params_of("rotation", degrees=37)[:, 0], [p["angle"] for p in found])


@pytest.mark.parametrize("size", [32, 97])
def test_parameters_of_affine_maps(size):
    options = {"degrees": 20, "translate": (0.1, 0.3), "scale": (0.7, 1.6)}
    ours = params_of("affine", **options, shear=(5, 12))
    found = theirs(v2.RandomAffine(**options, shear=(-5, 5, -12, 12)), size, size)
    assert_same(ours[:, 0], [p["angle"] for p in found])
    assert_same(ours[:, 3], [p["scale"] for p in found])
    for axis in range(2):
        # Shifts are rounded to pixels of the rendering.
        shifts = np.rint(ours[:, 1 + axis] * size).astype(int)
        assert_same_counts(shifts, np.array([p["translate"][axis] for p in found]))
        assert_same(ours[:, 4 + axis], [p["shear"][axis] for p in found])


def test_standard_deviations_of_blur():
    found = theirs(v2.GaussianBlur(23, sigma=(0.1, 2.0)))
    assert_same(params_of("blur")[:, 1], [p["sigma"][0] for p in found])


@pytest.mark.parametrize(
    ("scale", "ratio"),
    [
        ((0.02, 0.33), (0.3, 3.3)),
        ((0.1, 0.2), (2.0, 4.0)),
        ((0.2, 0.9), (0.3, 0.6)),
        ((0.95, 1.0), (0.3, 3.3)),
    ],
)
@pytest.mark.parametrize("size", [32, 224])
def test_boxes_of_random_erasing(scale, ratio, size):
    found = theirs(v2.RandomErasing(p=1.0, scale=scale, ratio=ratio), size, size)
    boxes = params_of("random_erasing", reference_size=size, probability=1.0, scale=scale, ratio=ratio)
    ours = np.rint(boxes * size).astype(int)
    other = np.array([[p["i"], p["j"], p["h"], p["w"]] for p in found])
    other[[p["v"] is None for p in found]] = 0
    assert_same_counts(ours[:, 2] > 0, other[:, 2] > 0)
    ours, other = (boxes[boxes[:, 2] > 0] for boxes in (ours, other))
    for axis in range(4):
        assert_same(ours[:, axis], other[:, axis])
    assert_same(ours[:, 2] / ours[:, 3], other[:, 2] / other[:, 3])
    assert_same(ours[:, 2] * ours[:, 3], other[:, 2] * other[:, 3])


def test_probability_of_random_erasing():
    for probability in (0.0, 0.25, 1.0):
        taken = params_of("random_erasing", probability=probability)[:, 2] > 0
        # One of 10 attempts fits but for few.
        assert abs(taken.mean() - probability) < 0.012


# Policies: what torchvision's classes pass to the step that they take.


def theirs_steps(policy, count, height=32):
    """Steps (kind, magnitude) of each call of torchvision's policy, and what it blends with."""
    calls, weights = [], []

    class Recorded(type(policy)):
        def _apply_image_or_video_transform(self, image, transform_id, magnitude, interpolation, fill):
            calls[-1].append((transform_id.lower(), magnitude))
            return image

        def _sample_dirichlet(self, params):
            weights.append(super()._sample_dirichlet(params)[0].tolist())
            return torch.tensor([weights[-1]])

    policy.__class__ = Recorded
    image = torch.zeros(3, height, height, dtype=torch.uint8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        for _ in range(count):
            calls.append([])
            policy(image)
    return calls, weights


def codes(steps, size=32):
    """Kind and signed magnitude of steps as texts, the same of both libraries; the identity has none."""
    return [code(kind, magnitude, size) for kind, magnitude in steps]


@functools.cache
def code(kind, magnitude, size):
    name = kind.replace("_", "")
    # Ours are shares of the side; steps of 2**-16 of it would show in further digits.
    value = magnitude * size if kind.startswith("translate_") else magnitude
    number = f"{value:.1f}" if name.startswith("translate") else f"{value:.3f}"
    return name if name == "identity" else f"{name} {float(number) + 0.0}"


def ours_steps(params, first=0):
    """Steps (kind, magnitude) of every row of an op's parameters."""
    kinds, magnitudes = (params[:, first::2] * GRID).astype(int), params[:, first + 1 :: 2]
    return [
        [(KINDS[kind], value) for kind, value in zip(*row, strict=True)]
        for row in zip(kinds, magnitudes, strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "options", "transform"),
    [
        ("rand_augment", {}, v2.RandAugment),
        ("rand_augment", {"num_ops": 1, "magnitude": 4, "num_magnitude_bins": 9}, v2.RandAugment),
        ("trivial_augment_wide", {"num_magnitude_bins": 4}, v2.TrivialAugmentWide),
        ("trivial_augment_wide", {}, v2.TrivialAugmentWide),
    ],
)
def test_kinds_magnitudes_and_signs_of_random_steps(name, options, transform):
    found, _ = theirs_steps(transform(**options), THEIRS)
    ours = ours_steps(params_of(name, **options))
    for place in range(len(found[0])):
        steps, other = (np.array(codes(s[place] for s in rows)) for rows in (ours, found))
        assert set(other) <= set(steps)
        assert_same_counts(steps, other)
    if len(found[0]) == 2:
        pairs, other = (
            np.array(["+".join(code.split()[0] for code in codes(steps)) for steps in rows])
            for rows in (ours, found)
        )
        assert_same_counts(pairs, other)


@pytest.mark.parametrize("policy", ["imagenet", "cifar10", "svhn"])
def test_pairs_probabilities_and_signs_of_auto_augment(policy):
    found, _ = theirs_steps(v2.AutoAugment(AutoAugmentPolicy(policy)), 2 * THEIRS)
    ours = ours_steps(params_of("auto_augment", policy=policy))
    pairs = [
        np.array(["+".join(code for code in codes(steps) if code != "identity") for steps in rows])
        for rows in (ours, found)
    ]
    assert len(np.unique(pairs[1])) > 40
    assert_same_counts(*pairs)


@pytest.mark.parametrize(
    "options", [{}, {"severity": 10, "mixture_width": 2, "chain_depth": 2, "all_ops": False}]
)
def test_chains_and_weights_of_aug_mix(options):
    transform = v2.AugMix(**options)
    width, depth = transform.mixture_width, transform.chain_depth if transform.chain_depth > 0 else 3
    calls, weights = theirs_steps(transform, 3000)
    params = params_of("aug_mix", **options)
    own, chains = params[:, 0], params[:, 1 : 1 + width]
    assert np.array_equal(params[:, : 1 + width].sum(axis=1), np.ones(DRAWN))
    assert (params[:, : 1 + width] >= 0).all()
    both = np.array(weights[0::2])
    inner = np.array(weights[1::2])
    assert_same(own, both[:, 0])
    for chain in range(width):
        assert_same(chains[:, chain], inner[:, chain] * both[:, 1])
    assert_same(chains.max(axis=1), (inner * both[:, 1:]).max(axis=1))
    steps = ours_steps(params, 1 + width)
    taken = [[step for step in row if step[0] != "identity"] for row in steps]
    assert_same_counts(np.array([len(row) for row in taken]), np.array([len(row) for row in calls]))
    # Steps not taken come last in a chain.
    for row in steps[:500]:
        for chain in range(width):
            kinds = [kind == "identity" for kind, _ in row[chain * depth : (chain + 1) * depth]]
            assert kinds == sorted(kinds)
            assert not kinds[0]
    flat, other = (np.array([code for row in rows for code in codes(row)]) for rows in (taken, calls))
    assert_same_counts(flat, other)


# Mixing


def assert_beta(shares, alpha):
    """Shares on the grid are as many in each range as Beta(alpha, alpha), which crowds at both ends, says."""
    low = np.array([0.5, 1.5, 4.5, 20.5, 100.5, 400.5, 1600.5, 6400.5, 16000.5, 26000.5]) / GRID
    edges = np.concatenate([[0], low, [0.5], 1 - low[::-1], [1]])
    found = np.histogram(shares / GRID, edges)[0]
    expected = len(shares) * np.diff(beta(alpha, alpha).cdf(edges))
    keep = expected > 5
    rest = [values[~keep].sum() for values in (found, expected)]
    pairs = [np.append(values[keep], more) for values, more in zip((found, expected), rest, strict=True)]
    observed, wanted = (values[pairs[1] > 0] for values in pairs)
    assert chisquare(observed, wanted).pvalue > LEAST


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.4, 0.8, 1.0])
def test_shares_of_mixup_are_beta_distributed(alpha):
    mixing = Mix(mixup_alpha=alpha).draw(Draws(0, np.arange(DRAWN), 0, 6), 100)
    kinds, _, shares, _ = mixing
    assert (kinds == MIXUP).all()
    assert_beta(shares, alpha)
    others = np.random.default_rng(0).beta(alpha, alpha, DRAWN)
    assert_same(shares, np.rint(others * GRID))
    others = [p["lam"] for p in theirs(v2.MixUp(alpha=alpha, num_classes=2))]
    assert_same(shares, np.rint(np.array(others) * GRID))


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_boxes_and_shares_of_cutmix(alpha):
    size = 4096
    kinds, _, shares, boxes = Mix(cutmix_alpha=alpha).draw(Draws(3, np.arange(DRAWN), 0, 6), 100)
    assert (kinds == CUTMIX).all()
    found = theirs(v2.CutMix(alpha=alpha, num_classes=2), size, size)
    left, top, right, bottom = np.array([p["box"] for p in found]).T
    edges = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1) * size // GRID
    for axis, other in enumerate((top, left, bottom, right)):
        assert_same(edges[:, axis], other)
    for axis, other in enumerate((bottom - top, right - left)):
        assert_same(boxes[:, 2 + axis] * size // GRID, other)
    assert_same(shares / GRID, [p["lam_adjusted"] for p in found])


def test_both_mixes_keep_their_own_alpha():
    mix = Mix(mixup_alpha=0.2, cutmix_alpha=1.0, cutmix_probability=0.3)
    kinds, _, shares, boxes = mix.draw(Draws(1, np.arange(DRAWN), 0, 6), 100)
    assert abs((kinds == CUTMIX).mean() - 0.3) < 0.012
    assert_beta(shares[kinds == MIXUP], 0.2)
    alone = Mix(cutmix_alpha=1.0).draw(Draws(2, np.arange(DRAWN), 0, 6), 100)
    assert_same(shares[kinds == CUTMIX], alone[2])
    assert_same(boxes[kinds == CUTMIX, 2], alone[3][:, 2])
