"""Reductions of activations: each equals the formula of its paper in float64, written out in loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from coursepack.models import reductions

SHAPES = pytest.mark.parametrize("shape", [(3, 5, 4, 4), (2, 1, 1, 1), (2, 4, 3, 6)], ids=str)


def maps(shape, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(0.3, scale, shape).astype(np.float32))


def wide(tensor):
    return tensor.numpy().astype(np.float64)


def check_close(got, expected):
    assert got.dtype == torch.float32
    assert tuple(got.shape) == expected.shape
    assert np.abs(got.numpy() - expected).max() <= 2e-6 * max(1.0, np.abs(expected).max())


def unit_channels(features):
    """Channels `(N, C, P)` float64, each of unit length over its places."""
    flat = features.reshape(*features.shape[:2], -1)
    return flat / np.sqrt((flat**2).sum(2, keepdims=True))


@SHAPES
def test_attention_is_the_mean_square_over_channels(shape):
    features = maps(shape)
    expected = np.zeros((shape[0], shape[2] * shape[3]))
    for n, c, y, x in itertools.product(*map(range, shape)):
        expected[n, y * shape[3] + x] += wide(features)[n, c, y, x] ** 2 / shape[1]
    check_close(reductions.attention(features), expected)


@SHAPES
def test_pooled_is_the_mean_over_places(shape):
    features = maps(shape)
    expected = np.array([[np.mean(channel) for channel in sample] for sample in wide(features)])
    check_close(reductions.pooled(features), expected)


@SHAPES
def test_gram_compares_places_over_unit_channels(shape):
    features = maps(shape)
    flat = unit_channels(wide(features))
    expected = np.array([sum(np.outer(c, c) for c in sample) / shape[1] for sample in flat])
    check_close(reductions.gram(features), expected)


def test_distance_of_grams_is_the_kernel_distance_of_nst():
    """Huang and Wang 2017, equation 5 with the polynomial kernel (x . y)**2, summed by brute force."""
    teacher, student = maps((4, 6, 3, 3), seed=1), maps((4, 9, 3, 3), seed=2)
    distance = (reductions.gram(teacher) - reductions.gram(student)).square().sum((1, 2))

    def mean_kernel(left, right):
        return np.mean([[(a @ b) ** 2 for b in right] for a in left])

    for n in range(4):
        t, s = unit_channels(wide(teacher))[n], unit_channels(wide(student))[n]
        expected = mean_kernel(t, t) + mean_kernel(s, s) - 2 * mean_kernel(s, t)
        assert expected > 1e-3
        assert distance[n] == pytest.approx(expected, rel=1e-4)


def test_gram_of_a_dead_channel_is_finite():
    features = maps((2, 3, 4, 4))
    features[:, 1] = 0
    alive = features[:, [0, 2]]
    torch.testing.assert_close(reductions.gram(features), reductions.gram(alive) * 2 / 3)


def test_flow_is_the_mean_product_over_places():
    """Yim et al. 2017, equation 1."""
    first, second = maps((3, 4, 5, 5)), maps((3, 7, 5, 5), seed=1)
    expected = np.zeros((3, 4, 7))
    for n, i, j, y, x in itertools.product(range(3), range(4), range(7), range(5), range(5)):
        expected[n, i, j] += wide(first)[n, i, y, x] * wide(second)[n, j, y, x] / 25
    check_close(reductions.pair_gram(first, second), expected)


def halved(features):
    """Maps averaged over tiles of 2 x 2."""
    n, c, h, w = features.shape
    return features.reshape(n, c, h // 2, 2, w // 2, 2).mean((3, 5))


def test_flow_between_maps_of_two_sizes_averages_the_larger():
    first, second = maps((3, 4, 8, 8)), maps((3, 7, 4, 4), seed=1)
    expected = np.einsum("nihw,njhw->nij", halved(wide(first)), wide(second)) / 16
    check_close(reductions.pair_gram(first, second), expected)
    check_close(reductions.pair_gram(second, first), expected.transpose(0, 2, 1))


def test_resized_averages_down_and_repeats_up():
    features = maps((2, 3, 6, 6))
    check_close(reductions.resized(features, 3), halved(wide(features)))
    check_close(reductions.resized(features, 6), wide(features))
    check_close(reductions.resized(features, 12), wide(features).repeat(2, axis=2).repeat(2, axis=3))
    check_close(reductions.resized(features, 1), wide(features).mean((2, 3), keepdims=True))


MEANS = [0.0, 0.4, -0.4, 3.0, -3.0, 2.9, 0.05, -7.0, 1e-3]
DEVIATIONS = [1.0, 0.2, 5.0, 1.0, 2.0, 1.0, 0.02, 0.5, 1e3]


def mean_below_zero(mean, deviation):
    """Mean of a normal variable given that it is negative, and how likely that is, summed numerically."""
    edge = min(0.0, mean + 12 * deviation)
    places = np.linspace(mean - 12 * deviation, edge, 200_001)
    density = np.exp(-0.5 * ((places - mean) / deviation) ** 2) / (deviation * math.sqrt(2 * math.pi))
    mass = np.trapezoid(density, places)
    return np.trapezoid(density * places, places) / mass, mass


def test_margins_are_means_of_what_is_negative():
    bias, weight = torch.tensor(MEANS), torch.tensor(DEVIATIONS)
    for sign in (1, -1):
        for got, mean, deviation in zip(
            reductions.margins(bias, sign * weight), MEANS, DEVIATIONS, strict=True
        ):
            expected, mass = mean_below_zero(mean, deviation)
            assert mass > 0.001
            assert float(got) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("deviations", [3.0902, 3.2, 6.0, 50.0])
def test_margin_of_what_is_hardly_ever_negative_is_three_deviations(deviations):
    # Phi(-3.0902) is 0.001; just above that, the mean below zero is still the formula's.
    got = reductions.margins(torch.tensor([0.7 * deviations, 0.7 * 3.08]), torch.tensor([0.7, 0.7]))
    assert mean_below_zero(0.7 * 3.0903, 0.7)[1] < 0.001 < mean_below_zero(0.7 * 3.0901, 0.7)[1]
    expected = -2.1 if deviations > 3.0903 else mean_below_zero(0.7 * deviations, 0.7)[0]
    assert got.tolist() == pytest.approx([expected, mean_below_zero(0.7 * 3.08, 0.7)[0]], rel=1e-4)


def test_margins_of_a_channel_without_spread_are_finite():
    got = reductions.margins(torch.tensor([0.5, -0.5, 0.0]), torch.zeros(3))
    assert got.tolist() == pytest.approx([0, -0.5, 0], abs=1e-6)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 2, 5)], ids=str)
def test_above_margin_is_the_larger_per_channel(shape):
    features, margins = maps(shape, scale=2), torch.tensor([-1.0, 0.0, -0.2])
    expected = wide(features).copy()
    for channel, margin in enumerate(wide(margins)):
        expected[:, channel] = np.maximum(expected[:, channel], margin)
    assert (expected != wide(features)).any()
    assert np.array_equal(reductions.above_margin(features, margins).numpy(), expected)


def test_reductions_by_name():
    features = maps((2, 3, 4, 4))
    shapes = {name: tuple(reduce(features).shape) for name, reduce in reductions.REDUCTIONS.items()}
    assert shapes == {
        "map": (2, 3, 4, 4),
        "pooled": (2, 3),
        "attention": (2, 16),
        "gram": (2, 16, 16),
        "sign": (2, 3, 4, 4),
    }
    assert reductions.REDUCTIONS["map"](features) is features
    # A store packs the signs, and needs the values for that.
    assert reductions.REDUCTIONS["sign"](features) is features


@pytest.mark.parametrize(
    "reduce",
    [
        lambda x: reductions.attention(x),
        lambda x: reductions.gram(x),
        lambda x: reductions.pooled(x),
        lambda x: reductions.pair_gram(x[..., :2, :2], x),
        lambda x: reductions.above_margin(x, torch.tensor([0.1, 0.2, -0.4])),
        lambda x: reductions.resized(x, 2),
        lambda x: reductions.sketch(x, 7),
    ],
    ids=["attention", "gram", "pooled", "pair_gram", "above_margin", "resized", "sketch"],
)
def test_a_student_gets_its_gradient(reduce):
    features = maps((2, 3, 4, 4)).double().requires_grad_()
    assert torch.autograd.gradcheck(reduce, features)


@pytest.mark.parametrize("shape", [(4, 10), (4, 3, 5)], ids=str)
@pytest.mark.parametrize(
    ("reduce", "name"),
    [
        (reductions.attention, "attention"),
        (reductions.gram, "gram"),
        (reductions.pooled, "pooled"),
        (lambda x: reductions.resized(x, 2), "an output size"),
        (lambda x: reductions.pair_gram(x, maps((4, 3, 2, 2))), "gram"),
        (lambda x: reductions.pair_gram(maps((4, 3, 2, 2)), x), "gram"),
    ],
)
def test_what_is_no_map_is_refused(reduce, name, shape):
    with pytest.raises(ValueError) as refusal:
        reduce(torch.zeros(shape))
    assert str(refusal.value) == f"{name} needs feature maps (N, C, H, W), got {shape}"


def sketch_by_hand(features, width, seed=0):
    """docs/store-format.md, section Sketches, in loops."""
    flat = wide(features).reshape(len(features), -1)
    values = flat.shape[1]
    words = np.random.Philox(key=[seed, (values << 32) + width]).random_raw(2 * values)
    order = sorted(range(values), key=lambda value: int(words[value]))
    found = np.zeros((len(flat), width))
    for position, value in enumerate(order):
        sign = 1 if int(words[values + position]) >> 63 else -1
        found[:, position % width] += sign * flat[:, value]
    return found


@pytest.mark.parametrize("width", [1, 7, 16, 79])
def test_a_sketch_is_the_one_that_the_format_describes(width):
    features = maps((3, 5, 4, 4))
    check_close(reductions.sketch(features, width), sketch_by_hand(features, width))
    assert torch.equal(reductions.sketch(features, width), reductions.sketch(features, width))


@pytest.mark.parametrize("width", [12, 13])
def test_a_sketch_is_smaller_than_what_it_is_made_of(width):
    with pytest.raises(ValueError) as refusal:
        reductions.sketch(maps((2, 3, 2, 2)), width)
    assert str(refusal.value) == (
        f"a sketch of {width} values needs more values than that, got 12: leave it out"
    )


SEEDS = 3000


def sketches(features, width):
    """One sketch per seed, `(SEEDS, N, width)` float64."""
    return torch.stack([reductions.sketch(features.double(), width, seed) for seed in range(SEEDS)])


def test_sketches_keep_inner_products_on_average():
    """Unbiased, with a variance of at most (|x|² |y|² + (x . y)² - 2 sum x² y²) / width."""
    features = maps((6, 4, 4, 4), seed=3).relu()
    flat, width = features.double().flatten(1), 16
    products = flat @ flat.T
    seen = torch.einsum("snd,smd->snm", *[sketches(features, width)] * 2)
    norms = products.diagonal()
    bound = (norms[:, None] * norms + products**2 - 2 * flat.square() @ flat.square().T) / width
    assert ((seen.mean(0) - products).abs() <= 4.5 * (bound / SEEDS).sqrt()).all()
    assert (seen.var(0) <= 1.15 * bound).all()
    assert (seen.var(0) >= 0.5 * bound).all(), "the bound is not a loose one"


@pytest.mark.parametrize("width", [16, 64])
def test_what_normalization_makes_of_sketches(width):
    """Rows of inner products of unit length, as SP compares them: the bias falls as 1 / width."""
    features = maps((6, 8, 4, 4), seed=3).relu()

    def unit_rows(flat):
        return torch.nn.functional.normalize(flat @ flat.mT, dim=-1)

    exact = unit_rows(features.double().flatten(1))
    seen = unit_rows(sketches(features, width))
    bias, spread = (seen.mean(0) - exact).abs().max(), seen.std(0).max()
    assert bias <= 1.5 / width
    assert spread <= 1.0 / math.sqrt(width)
    assert bias >= 3 * (spread / math.sqrt(SEEDS)), "normalization does add a bias"


def test_a_sketch_made_in_inference_mode_serves_a_backward_pass():
    features = maps((2, 3, 4, 4), seed=9)
    with torch.inference_mode():
        expected = reductions.sketch(features, 11, seed=77)
    features.requires_grad_()
    found = reductions.sketch(features, 11, seed=77)
    found.square().sum().backward()
    assert torch.equal(found.detach(), expected.clone())
    assert features.grad.abs().min() > 0
