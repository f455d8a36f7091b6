"""Drawn parameters: a pure function of (seed, sample, view), pinned in a file, unrelated to each other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare
from view_cases import MIXES, OP_NAMES, RECIPES, SIZED, Sized, arrays_of, drawn, only_op, recipe_of

from coursepack.data import PRESETS, ViewRecipe, open_source
from coursepack.data.randomness import Draws, Purpose
from coursepack.data.views import GRID, PadCrop, ViewParams, draw
from coursepack.data.views.mixing import Mix
from coursepack.data.views.params import CUTMIX, MIXUP, NO_MIX, concatenate
from coursepack.data.views.policies import KINDS

GOLDEN = json.loads((Path(__file__).parent / "golden" / "view-params.json").read_text())
SAMPLES = np.array([0, 1, 299, 123456789012])
COUNT = 500


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_parameters_are_drawn_for_ever(name):
    entry = GOLDEN[name]
    recipe = ViewRecipe.model_validate(entry["recipe"])
    assert recipe == RECIPES[name]
    for view, expected in entry["views"].items():
        found = arrays_of(draw(recipe, SIZED, SAMPLES, int(view)))
        assert {part: values.tolist() for part, values in found.items()} == expected
    assert draw(recipe, SIZED, np.arange(2000), 3).digest() == entry["digest"]


def test_golden_file_has_every_preset_op_and_mix():
    assert list(GOLDEN) == list(RECIPES)
    assert set(PRESETS) | set(MIXES) < set(GOLDEN)
    assert {op["op"] for entry in GOLDEN.values() for op in entry["recipe"]["ops"]} == set(OP_NAMES)


def test_digits_never_draw_other_views():
    # These literals were drawn by the first release; another value breaks every store.
    digits = open_source("digits")
    two_ops = ViewRecipe(ops=(PadCrop(padding=2), PadCrop(padding=1)), reference_size=8)
    assert draw(PRESETS["digits"], digits, np.arange(1442), 0).digest() == "4b2289c3"
    assert draw(two_ops, digits, np.arange(1442), 7).digest() == "c989d52c"


@pytest.mark.parametrize("name", RECIPES)
def test_numbers_have_the_types_that_are_stored(name):
    for part, values in drawn(name, 0, COUNT).items():
        assert len(values) == COUNT
        small = {"kinds": np.uint8, "flips": np.uint8, "partners": np.int64}
        assert values.dtype == small.get(part.split()[-1], np.int32), part


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(RECIPES)), st.integers(1, 600), st.integers(0, 2**32 - 1), st.sampled_from([0, 6])
)
def test_draws_do_not_depend_on_batches_or_order(name, batch_size, shuffle, view):
    alone = drawn(name, view, COUNT)
    order = np.random.default_rng(shuffle).permutation(COUNT)[:200]
    chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    joined = concatenate([draw(RECIPES[name], SIZED, chunk, view) for chunk in chunks])
    for part, values in arrays_of(joined).items():
        assert np.array_equal(values, alone[part][order]), part


@pytest.mark.parametrize("name", RECIPES)
def test_one_sample_by_itself_draws_what_it_draws_among_others(name):
    whole = drawn(name, 6, COUNT)
    for sample in (0, 17, COUNT - 1):
        for part, values in arrays_of(draw(RECIPES[name], SIZED, np.array([sample]), 6)).items():
            assert np.array_equal(values[0], whole[part][sample]), part
    assert len(draw(RECIPES[name], SIZED, np.empty(0, dtype=np.int64), 6)) == 0


def test_ops_and_mixing_that_are_added_change_nothing_drawn_before():
    recipe = RECIPES["imagenet-strong"]
    whole = arrays_of(draw(recipe, SIZED, np.arange(99), 2))
    for ops in range(len(recipe.ops)):
        fewer = recipe.model_copy(update={"ops": recipe.ops[:ops], "mix": None})
        found = arrays_of(draw(fewer, SIZED, np.arange(99), 2))
        for part, values in found.items():
            if part.startswith("op") or ops >= 2:
                assert np.array_equal(values, whole[part]), (ops, part)


def test_only_the_images_sizes_and_their_number_matter_of_a_source():
    # Square images of one size and frames without proportions: the same view at any resolution.
    for name in ("cifar", "cifar-strong", "digits"):
        boxes = [draw(RECIPES[name], Sized(fixed=(s, s)), np.arange(50), 1).digest() for s in (8, 32, 500)]
        assert len(set(boxes)) == 1
    few = draw(RECIPES["imagenet"], Sized(count=3), np.arange(50), 1)
    assert few.digest() == draw(RECIPES["imagenet"], SIZED, np.arange(50), 1).digest()


def test_pixel_units_are_those_of_the_reference_frame():
    def boxes(name, side, /, **options):
        recipe = recipe_of((name, options), reference_size=side)
        return draw(recipe, SIZED, np.arange(99), 0).boxes

    assert np.array_equal(boxes("pad_crop", 8, padding=2), boxes("pad_crop", 16, padding=2) * [2, 2, 1, 1])
    assert np.array_equal(boxes("pad_crop", 8, padding=2), boxes("pad_crop", 8, padding=2) // 8192 * 8192)
    assert np.array_equal(boxes("center_crop", 8, size=6), boxes("center_crop", 16, size=12))
    erased = [
        draw(recipe_of(("random_erasing", {}), reference_size=size), SIZED, np.arange(999), 0).pixel_ops[0]
        for size in (7, 224)
    ]
    # Edges lie on whole pixels of the frame.
    for size, found in zip((7, 224), erased, strict=True):
        edges = np.concatenate([found[:, :2], found[:, :2] + found[:, 2:]])
        assert np.array_equal(edges, np.rint(edges * size / GRID).astype(int) * GRID // size)
    for size in (32, 64):
        op = only_op("trivial_augment_wide")
        found = op.draw(Draws(0, np.arange(4000), 0, 16), size)
        shifts = found[np.isin(found[:, 0], [KINDS.index("translate_x"), KINDS.index("translate_y")]), 1]
        assert abs(shifts).max() == 32 * GRID // size


def test_a_flip_turns_what_crops_after_it_see():
    for flip, axis, bit in (("horizontal_flip", 1, 1), ("vertical_flip", 0, 2)):
        crop = ("pad_crop", {"padding": 5})
        ops = [(flip, {"probability": 1.0}), crop]
        flipped, plain = (
            draw(recipe_of(*chosen, reference_size=32), SIZED, np.arange(300), 0)
            for chosen in (ops, [(flip, {"probability": 0.0}), crop])
        )
        assert (flipped.flips == bit).all()
        assert (plain.flips == 0).all()
        expected = plain.boxes.copy()
        expected[:, axis] *= -1
        assert np.array_equal(flipped.boxes, expected)
        # Crops of crops turn about the crop's own middle.
        sizes = Sized(fixed=(400, 400))
        nested = [("resized_crop", {"scale": (0.5, 0.5), "ratio": (1, 1)})]
        inner = [("resized_crop", {"scale": (0.25, 0.25), "ratio": (1, 1)})]
        boxes = []
        for probability in (0.0, 1.0):
            recipe = recipe_of(*nested, (flip, {"probability": probability}), *inner)
            boxes.append(draw(recipe, sizes, np.arange(300), 0).boxes.astype(np.int64))
        outer = draw(recipe_of(*nested), sizes, np.arange(300), 0).boxes
        offset, turned = (found[:, axis] - outer[:, axis] for found in boxes)
        assert abs(offset + turned + boxes[0][:, 2 + axis] - outer[:, 2 + axis]).max() <= 2
        assert np.array_equal(boxes[0][:, 1 - axis], boxes[1][:, 1 - axis])


def test_two_flips_by_chance_are_an_exclusive_or():
    first, both = (
        draw(recipe_of(*[("horizontal_flip", {})] * times), SIZED, np.arange(4000), 0).flips
        for times in (1, 2)
    )
    assert abs((first ^ both).mean() - 0.5) < 0.03
    assert set(np.unique(both)) == {0, 1}


# Mixing


@pytest.mark.parametrize("name", MIXES)
def test_partners_come_from_the_whole_split_and_never_from_the_batch(name):
    recipe, source = RECIPES[name], Sized(count=1000)
    samples = np.arange(20)
    mixing = draw(recipe, source, samples, 0).mixing
    mixed = mixing.kinds != NO_MIX
    assert np.array_equal(mixing.partners[~mixed], samples[~mixed])
    assert np.isin(mixing.partners[mixed], samples).mean() < 0.5
    again = draw(recipe, source, np.arange(1000)[::-1], 0).mixing
    assert np.array_equal(again.partners[::-1][:20], mixing.partners)


@pytest.mark.parametrize("population", [1, 2, 10, 97])
def test_partners_are_uniform_and_unrelated_to_the_sample(population):
    recipe = RECIPES["mixup"]
    mixing = draw(recipe, Sized(count=population), np.arange(40_000), 0).mixing
    counts = np.bincount(mixing.partners, minlength=population)
    assert len(counts) == population
    if population > 1:
        assert chisquare(counts).pvalue > 1e-3
        assert_unrelated(mixing.partners, np.arange(40_000) % population)


def test_partners_parameters_are_their_own_view_unmixed():
    for name in ("imagenet-strong", "cifar-strong", "switch"):
        recipe, source = RECIPES[name], Sized(count=300)
        mixing = draw(recipe, source, np.arange(80), 4).mixing
        unmixed = recipe.model_copy(update={"mix": None})
        assert mixing.params.digest() == draw(unmixed, source, mixing.partners, 4).digest()
        assert mixing.params.mixing is None


@pytest.mark.parametrize("name", [*MIXES, "cifar-strong", "imagenet-strong"])
def test_shares_belong_to_kinds_and_boxes(name):
    mix = RECIPES[name].mix
    mixing = draw(RECIPES[name], SIZED, np.arange(20_000), 0).mixing
    kinds, shares, boxes = mixing.kinds, mixing.shares, mixing.boxes.astype(np.int64)
    none, cut = kinds == NO_MIX, kinds == CUTMIX
    assert (shares[none] == GRID).all()
    assert (shares >= 0).all()
    assert (shares <= GRID).all()
    assert not boxes[~cut].any()
    assert (boxes >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= GRID).all()
    # The label's share is the area of the box as it is cut off at the borders.
    area = boxes[cut, 2] * boxes[cut, 3]
    assert np.array_equal(shares[cut], GRID - np.floor(area / GRID + 0.5))
    off_border = (boxes[:, :2] > 0).all(axis=1) & (boxes[:, :2] + boxes[:, 2:] < GRID).all(axis=1) & cut
    assert np.array_equal(boxes[off_border, 2], boxes[off_border, 3])
    assert abs(none.mean() - (1 - mix.probability)) < 0.015
    cutmix = mix.cutmix_probability if mix.mixup_alpha and mix.cutmix_alpha else float(mix.cutmix_alpha > 0)
    assert abs(cut[~none].mean() - cutmix) < 0.015
    assert set(np.unique(kinds[~none])) <= {MIXUP, CUTMIX}


# Independence


def assert_unrelated(first, second):
    """No correlation of values or of ranks' eighths, at five standard errors and p = 1e-4."""
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(len(first))
    edges = [np.quantile(values, np.arange(1, 8) / 8) for values in (first, second)]
    table = np.zeros((8, 8))
    np.add.at(table, tuple(np.searchsorted(e, v) for e, v in zip(edges, (first, second), strict=True)), 1)
    table = table[table.any(axis=1)][:, table.any(axis=0)]
    assert chi2_contingency(table).pvalue > 1e-4


def brightness(seed=0, view=0, place=0, start=0, count=20_000):
    """Factors drawn by the op at a place among jitters: uniform numbers `(N,)`."""
    ops = [("color_jitter", {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.5})] * 3
    recipe = recipe_of(*ops, seed=seed)
    return draw(recipe, SIZED, np.arange(start, start + count), view).pixel_ops[place][:, 2]


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1}, {"seed": 2**32}, {"seed": 2**63}, {"view": 1}, {"view": 2**31}, {"place": 1},
        {"place": 2}, {"start": 1}, {"start": 2}, {"start": 2**32}, {"seed": 1, "view": 1},
        {"place": 1, "start": 1},
    ],
    ids=str,
)  # fmt: skip
def test_no_correlation_across_seeds_views_ops_and_samples(other):
    assert_unrelated(brightness(), brightness(**other))


def test_seed_view_and_sample_are_no_sums():
    pairs = [
        ({"seed": 3, "view": 5}, {"seed": 5, "view": 3}),
        ({"seed": 1}, {"start": 1}),
        ({"view": 1}, {"start": 1}),
    ]
    for first, second in pairs:
        assert (brightness(**first) == brightness(**second)).mean() < 1e-3


def test_no_correlation_between_the_values_of_an_op_and_of_mixing():
    recipe = recipe_of(
        ("pad_crop", {"padding": 200}),
        ("color_jitter", {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.5}),
        ("rand_augment", {}),
        ("random_erasing", {}),
        mix=Mix(mixup_alpha=1.0, cutmix_alpha=1.0),
    )
    params = draw(recipe, SIZED, np.arange(10_000), 0)
    jitter, augment = params.pixel_ops[0], params.pixel_ops[1]
    uniform = [params.boxes[:, 0], params.boxes[:, 1], *jitter.T[1:], augment[:, 0], augment[:, 2]]
    uniform += [params.pixel_ops[2][:, 2], params.mixing.kinds, params.mixing.partners, params.mixing.shares]
    for place, first in enumerate(uniform):
        for other, second in enumerate(uniform[place + 1 :], start=place + 1):
            # A cutmix box is cut off where a mixup share is not.
            if (place, other) != (len(uniform) - 3, len(uniform) - 1):
                assert_unrelated(first, second)


def test_purposes_have_streams_of_their_own():
    samples = np.arange(1000)
    purposes = [*Purpose, *range(Purpose.VIEW + 1, Purpose.VIEW + 40)]
    assert len(set(purposes)) == len(purposes)
    words = [
        tuple(Draws(0, samples, 0, purpose).words(stream)[:, 0])
        for purpose in purposes
        for stream in (0, 1, 2, 33, 100)
    ]
    assert len(set(words)) == len(words)
    assert max(Purpose) + 1000 < 1 << 16


# Arrays of parameters


def test_rows_of_parameters_can_be_taken_and_joined():
    for name in ("imagenet-strong", "none", "cifar-strong"):
        params = draw(RECIPES[name], SIZED, np.arange(40), 0)
        rows = np.array([3, 3, 39, 0])
        assert params[rows].digest() == draw(RECIPES[name], SIZED, rows, 0).digest()
        assert concatenate([params[:7], params[7:]]).digest() == params.digest()
        assert len(params[rows]) == 4


def test_the_digest_sees_every_number():
    params = draw(RECIPES["imagenet-strong"], SIZED, np.arange(3), 0)
    digests = {params.digest()}
    for values in arrays_of(params).values():
        for place in range(values.size):
            values.flat[place] += 1
            digests.add(params.digest())
            values.flat[place] -= 1
    assert len(digests) == 1 + sum(values.size for values in arrays_of(params).values())
    assert ViewParams(params.boxes).digest() != params.digest()
    assert params.digest() in digests
