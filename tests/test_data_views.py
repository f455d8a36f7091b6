"""View recipes, their files, errors and fingerprints; batches and the order of an epoch."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from view_cases import OP_NAMES, OPS, RECIPES, only_op, recipe_of

from coursepack.canonical import canonical_json, difference_table, differences, fingerprint
from coursepack.config import parse_config, write_yaml
from coursepack.data import PRESETS, Batch, ViewRecipe, open_source, view_fingerprint, view_recipe
from coursepack.data.batches import Window, batches, epoch_order
from coursepack.data.store.owners import Part
from coursepack.data.views import PadCrop, ViewParams, draw, render
from coursepack.data.views.mixing import Mix
from coursepack.errors import RecipeError, UnknownName
from coursepack.kernels import MixedLabels

DIGITS = PRESETS["digits"]
SOURCE = open_source("digits")
TWO_OPS = ViewRecipe(ops=(PadCrop(padding=2), PadCrop(padding=1)), reference_size=8)
MIXED = ViewRecipe(ops=TWO_OPS.ops, mix=Mix(mixup_alpha=0.5, cutmix_alpha=1.0), reference_size=8)


def drawn_in_batches(recipe, samples, view, batch_size):
    chunks = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
    return np.concatenate([draw(recipe, SOURCE, chunk, view).boxes for chunk in chunks])


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([7, 64, 1024]),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 9, 2**31]),
    st.integers(1, 7),
)
def test_draws_and_pixels_do_not_depend_on_batches_or_order(batch_size, shuffle, view, size):
    source = open_source("digits")
    order = np.random.default_rng(shuffle).permutation(1442)[:300]
    alone = draw(TWO_OPS, SOURCE, np.arange(1442), view)
    boxes = drawn_in_batches(TWO_OPS, order, view, batch_size)
    assert np.array_equal(boxes, alone.boxes[order])
    expected = render(TWO_OPS, source, order, ViewParams(alone.boxes[order]), size)
    several = batches(source, TWO_OPS, order, views=[view], batch_size=batch_size)
    pixels = np.concatenate([batch.pixels(size).numpy() for batch in several])
    assert np.array_equal(pixels, expected)


def test_epochs_see_every_sample_once_with_its_own_pixels():
    source = open_source("digits")
    everything = np.arange(1442)
    whole = render(DIGITS, source, everything, draw(DIGITS, SOURCE, everything, 3), 8)
    orders = []
    for epoch, batch_size in ((0, 64), (0, 1024), (1, 64)):
        order = epoch_order(everything, seed=5, epoch=epoch)
        several = list(batches(source, DIGITS, order, views=[3], batch_size=batch_size))
        assert [len(batch) for batch in several[:-1]] == [batch_size] * (len(several) - 1)
        orders.append(np.concatenate([batch.samples for batch in several]))
        for batch in several:
            assert np.array_equal(batch.pixels(8).numpy(), whole[batch.samples])
            assert np.array_equal(batch.labels.numpy(), source.labels[batch.samples])
    assert np.array_equal(np.sort(orders[0]), everything)
    assert np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 500), st.integers(1, 40), st.integers(1, 12), st.integers(0, 9))
def test_windows_hold_whole_chunks_and_every_sample_once(count, chunk_rows, chunks, epoch):
    window = Window(chunk_rows, chunks)
    assert window.rows == chunk_rows * chunks
    order = epoch_order(np.arange(count), seed=1, epoch=epoch, window=window)
    assert np.array_equal(np.sort(order), np.arange(count))
    # The last chunk may be short, and lies in any window.
    done, start = set(), 0
    while start < count:
        opened = dict.fromkeys((order[start:] // chunk_rows).tolist())
        opened = list(opened)[:chunks]
        rows = sum(min(chunk_rows, count - chunk * chunk_rows) for chunk in opened)
        assert set((order[start : start + rows] // chunk_rows).tolist()) == set(opened)
        assert not done & set(opened)
        done |= set(opened)
        start += rows


def test_windows_mix_samples_and_chunks_anew_each_epoch():
    window = Window(10, 5)
    first, second = (epoch_order(np.arange(1000), seed=1, epoch=epoch, window=window) for epoch in (0, 1))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, epoch_order(np.arange(1000), seed=1, epoch=0, window=window))
    plain = epoch_order(np.arange(1000), seed=1, epoch=0)
    for start in range(0, 1000, 50):
        held = first[start : start + 50]
        assert np.array_equal(held, plain[np.isin(plain, held)])
    chunks = first[:50] // 10
    assert len(set(chunks.tolist())) == 5
    assert sorted(set(chunks.tolist())) != [0, 1, 2, 3, 4]
    # Neighbours come from different chunks far more often than not, as they would of five.
    assert (np.diff(chunks) != 0).sum() > 25
    assert len({tuple(sorted(set((first[i : i + 50] // 10).tolist()))) for i in range(0, 1000, 50)}) == 20


def test_an_order_within_some_samples_is_of_those_alone():
    some = np.array([3, 900, 17, 4, 255])
    whole = epoch_order(np.arange(1000), seed=2, epoch=4)
    assert np.array_equal(epoch_order(some, seed=2, epoch=4), whole[np.isin(whole, some)])
    windowed = epoch_order(some, seed=2, epoch=4, window=Window(100, 1))
    assert np.array_equal(np.sort(windowed), np.sort(some))
    assert len(epoch_order(some[:0], seed=2, epoch=4, window=Window(100, 1))) == 0


def test_a_batch_of_mixed_views_has_the_pixels_of_each():
    source, samples = open_source("digits"), np.array([4, 4, 4, 9])
    batch = Batch(source, DIGITS, samples, np.array([0, 5, 0, 5]))
    for row, (sample, view) in enumerate(zip(samples, [0, 5, 0, 5], strict=True)):
        one = np.array([sample])
        expected = render(DIGITS, source, one, draw(DIGITS, SOURCE, one, view), 8)
        assert np.array_equal(batch.pixels(8)[row].numpy(), expected[0])


def test_several_views_share_a_batch_and_equal_those_one_by_one():
    order = np.array([8, 3, 1000, 77, 5])
    several = list(batches(SOURCE, MIXED, order, views=[4, 2, 9], batch_size=7))
    assert [len(batch) for batch in several] == [6, 6, 3]
    assert several[0].samples.tolist() == [8, 3, 8, 3, 8, 3]
    assert several[0].views.tolist() == [4, 4, 2, 2, 9, 9]
    for batch in several:
        for row, (sample, view) in enumerate(zip(batch.samples, batch.views, strict=True)):
            one = np.array([sample])
            params = draw(MIXED, SOURCE, one, int(view))
            assert params.digest() == batch.params[row : row + 1].digest()
            assert np.array_equal(batch.pixels(11)[row], render(MIXED, SOURCE, one, params, 11)[0])
    with pytest.raises(ValueError, match=r"batch_size is 2, expected at least one row per view \(3\)"):
        next(batches(SOURCE, MIXED, order, views=[1, 2, 3], batch_size=2))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 3), st.integers(1, 5), st.integers(0, 4))
def test_resumed_and_divided_batches_are_the_same_rows(count, batch_size, views, parts, first):
    order = epoch_order(np.arange(count), seed=0, epoch=0)
    options = {"views": list(range(views)), "batch_size": max(batch_size, views)}
    whole = list(batches(SOURCE, DIGITS, order, **options))
    resumed = list(batches(SOURCE, DIGITS, order, first=first, **options))
    assert [b.samples.tolist() for b in resumed] == [b.samples.tolist() for b in whole[first:]]
    ranks = [list(batches(SOURCE, DIGITS, order, part=Part(k, parts), **options)) for k in range(parts)]
    for shares, batch in zip(zip(*ranks, strict=True), whole, strict=True):
        assert np.array_equal(np.concatenate([share.samples for share in shares]), batch.samples)
        assert np.array_equal(np.concatenate([share.views for share in shares]), batch.views)


def test_labels_of_mixed_batches_are_both_with_the_first_ones_share():
    batch = Batch(SOURCE, MIXED, np.arange(200), np.full(200, 3))
    mixing = batch.params.mixing
    assert isinstance(batch.labels, MixedLabels)
    assert np.array_equal(batch.labels.first, SOURCE.labels[:200])
    assert np.array_equal(batch.labels.second, SOURCE.labels[mixing.partners])
    assert batch.labels.lam.dtype == torch.float32
    assert np.array_equal(batch.labels.lam.double() * 65536, mixing.shares)
    larger = np.where(mixing.shares >= 32768, SOURCE.labels[:200], SOURCE.labels[mixing.partners])
    assert np.array_equal(batch.main_labels, larger)
    plain = Batch(SOURCE, TWO_OPS, np.arange(9), np.zeros(9, dtype=np.int64))
    assert plain.labels is plain.main_labels


@pytest.mark.parametrize("name", PRESETS)
def test_recipe_from_yaml_is_the_preset(tmp_path, name):
    file = tmp_path / "view.yaml"
    file.write_text(write_yaml(PRESETS[name].model_dump(mode="json")))
    assert view_recipe(str(file)) == view_recipe(name) == PRESETS[name]
    assert view_recipe(str(file), seed=4) == PRESETS[name].model_copy(update={"seed": 4})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ops: [{op: pad_crop, padding: 0}]", r"ops\.0\.padding: expected at least 1, got 0"),
        ("sede: 3", "sede: unknown key, did you mean 'seed'"),
        ("seed: -1", r"seed: .*got -1"),
        ("[1, 2]", "is not valid"),
        ("ops: [", "is not YAML"),
    ],
)
def test_wrong_recipe_files_are_refused(tmp_path, text, message):
    file = tmp_path / "view.yml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=message) as refusal:
        view_recipe(str(file))
    assert str(file) in str(refusal.value)


def test_missing_recipe_file_and_unknown_preset(tmp_path):
    with pytest.raises(RecipeError, match="cannot read"):
        view_recipe(str(tmp_path / "none.yaml"))
    with pytest.raises(UnknownName, match=r"unknown view 'digit'\. Did you mean 'digits'\?"):
        view_recipe("digit")


PLACES = [
    ("pad_crop", {"paddng": 1, "padding": 1}, "ops.0.paddng: unknown key, did you mean 'padding'?"),
    ("random_erasing", {"vale": 1}, "ops.0.vale: unknown key, did you mean 'value'?"),
    ("auto_augment", {"fil": 1}, "ops.0.fil: unknown key, did you mean 'fill'?"),
    # Of this op's keys only, not of another's.
    ("center_crop", {"size": 3, "shorter": 3}, "ops.0.shorter: unknown key of 'center_crop'\n"),
    ("blurr", {}, "ops.0: unknown op 'blurr', did you mean 'blur'?"),
    ("zzz", {}, "ops.0: unknown op 'zzz', expected one of 'pad_crop', 'resized_crop', "),
    ("resized_crop", {"scale": (0.5, 0.2)}, "scale is (0.5, 0.2), expected 0 < smallest <= largest <= 1"),
    ("resized_crop", {"scale": (0, 1)}, "scale is (0.0, 1.0), expected 0 < smallest"),
    ("resized_crop", {"ratio": (0, 1)}, "ratio is (0.0, 1.0), expected 0 < smallest <= largest"),
    ("random_erasing", {"scale": (0.1, 1.5)}, "scale is (0.1, 1.5), expected 0 <= smallest <= largest <= 1"),
    ("random_erasing", {"ratio": (3, 1)}, "ratio is (3.0, 1.0), expected 0 < smallest <= largest"),
    ("random_erasing", {"value": 256}, "at most 255"),
    ("random_erasing", {"value": "nois"}, "'noise'"),
    ("blur", {"kernel_size": 4}, "kernel_size is 4, expected an odd number"),
    ("blur", {"sigma": (0, 1)}, "sigma is (0.0, 1.0), expected 0 < smallest <= largest <= 1024"),
    # Beyond what 32 bits hold in steps of 2**-16.
    ("blur", {"sigma": (1, 40000)}, "sigma is (1.0, 40000.0), expected 0 < smallest <= largest <= 1024"),
    ("color_jitter", {"brightness": 40000}, "at most 1024, got 40000"),
    ("affine", {"scale": (0, 1)}, "scale is (0.0, 1.0), expected 0.000976562 <= smallest <= largest <= 1024"),
    ("affine", {"shear": (90, 0)}, "less than 90"),
    ("affine", {"translate": (0, 1.5)}, "at most 1, got 1.5"),
    ("rotation", {}, "ops.0.degrees: is missing"),
    ("rand_augment", {"magnitude": 31}, "magnitude is 31, expected less than num_magnitude_bins (31)"),
    ("aug_mix", {"chain_depth": 0}, "chain_depth is 0, expected at least 1, or -1"),
    ("auto_augment", {"policy": "cifar"}, "'imagenet', 'cifar10' or 'svhn'"),
    ("horizontal_flip", {"probability": 1.1}, "at most 1, got 1.1"),
    ("posterize", {"bits": 9}, "at most 8, got 9"),
    ("color_jitter", {"hue": 0.6}, "at most 0.5, got 0.6"),
    ("pipeline", {"factory": "module"}, "ops.0.factory: expected module:function, got 'module'"),
]


@pytest.mark.parametrize(("op", "options", "text"), PLACES)
def test_wrong_ops_are_refused_at_their_place(op, options, text):
    with pytest.raises(RecipeError, match=re.escape(text)):
        parse_config(ViewRecipe, {"ops": [{"op": op, **options}], "reference_siz": 1}, "here")


def test_ops_that_are_none_and_mixes_that_mix_nothing():
    with pytest.raises(RecipeError) as refusal:
        parse_config(ViewRecipe, {"ops": [3, {"padding": 3}], "mix": {"mixup_alfa": 1}}, "here")
    assert str(refusal.value).splitlines() == [
        "here is not valid:",
        "  ops.0: expected a mapping, got 3",
        "  ops.1: 'op' is missing, got {'padding': 3}",
        "  mix.mixup_alfa: unknown key, did you mean 'mixup_alpha'?",
    ]
    with pytest.raises(ValidationError, match="mixup_alpha and cutmix_alpha are both 0: leave mix out"):
        Mix(probability=0.5)
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        Mix(mixup_alpha=1.5)


@pytest.mark.parametrize("before", ["grayscale", "random_erasing", "rand_augment"])
@pytest.mark.parametrize("after", ["horizontal_flip", "center_crop", "resized_crop"])
def test_crops_and_flips_come_before_ops_on_pixels(before, after):
    text = f"ops are ['{before}', '{after}']: move crops, resizes and flips before all other ops"
    early, late = (before, OPS[before][0]), (after, OPS[after][0])
    with pytest.raises(ValidationError, match=re.escape(text)):
        recipe_of(early, late)
    recipe = recipe_of(late, early)
    assert [op.op for op in recipe.geometry_ops] == [after]
    assert [op.op for op in recipe.pixel_ops] == [before]


def test_a_pipeline_stands_alone():
    pipeline = ("pipeline", {"factory": "a:b"})
    with pytest.raises(
        ValidationError, match=r"\['horizontal_flip', 'pipeline'\]: a pipeline must be the only op"
    ):
        recipe_of(("horizontal_flip", {}), pipeline)
    with pytest.raises(ValidationError, match="a pipeline must be the only op"):
        recipe_of(pipeline, pipeline)
    recipe = recipe_of(pipeline)
    assert recipe.pipeline is not None
    assert recipe.pixel_ops == recipe.geometry_ops == ()
    assert PRESETS["cifar"].pipeline is None


def test_presets_are_those_that_are_documented():
    ops = {name: [op.op for op in recipe.ops] for name, recipe in PRESETS.items()}
    assert ops == {
        "none": [],
        "eval": ["resize", "center_crop"],
        "digits": ["pad_crop"],
        "cifar": ["pad_crop", "horizontal_flip"],
        "cifar-strong": ["pad_crop", "horizontal_flip", "auto_augment", "random_erasing"],
        "imagenet": ["resized_crop", "horizontal_flip"],
        "imagenet-strong": ["resized_crop", "horizontal_flip", "rand_augment", "random_erasing"],
    }
    assert {name for name, recipe in PRESETS.items() if recipe.mix} == {"cifar-strong", "imagenet-strong"}
    assert {name: recipe.reference_size for name, recipe in PRESETS.items()} == {
        **dict.fromkeys(("none", "cifar", "cifar-strong"), 32),
        **dict.fromkeys(("eval", "imagenet", "imagenet-strong"), 224),
        "digits": 8,
    }


def test_every_op_has_cases_and_survives_a_file(tmp_path):
    assert set(OP_NAMES) == set(OPS)
    for name, recipe in RECIPES.items():
        file = tmp_path / "view.yaml"
        file.write_text(write_yaml(recipe.model_dump(mode="json")))
        assert view_recipe(str(file)) == recipe, name
    file.write_text("ops: [{op: pipeline, factory: 'my.module:views'}]")
    assert view_recipe(str(file)).pipeline == only_op("pipeline", factory="my.module:views")


def test_every_parameter_of_every_op_is_in_the_fingerprint():
    prints = [view_fingerprint(recipe, SOURCE) for recipe in RECIPES.values()]
    assert len(set(prints)) == len(prints)
    for name, variants in OPS.items():
        op = only_op(name, **variants[0])
        assert set(op.model_dump()) == set(type(op).model_fields)


def test_fingerprint_changes_with_seed_op_frame_and_source_and_with_nothing_else():
    source = open_source("digits")
    recipes = [
        DIGITS,
        PRESETS["none"],
        DIGITS.model_copy(update={"seed": 1}),
        DIGITS.model_copy(update={"reference_size": 16}),
        ViewRecipe(ops=(PadCrop(padding=2),), reference_size=8),
        TWO_OPS,
        ViewRecipe(ops=TWO_OPS.ops[::-1], reference_size=8),
    ]
    fingerprints = [view_fingerprint(recipe, source) for recipe in recipes]
    fingerprints.append(view_fingerprint(DIGITS, open_source("digits:test")))
    assert len(set(fingerprints)) == len(fingerprints)
    again = ViewRecipe.model_validate(
        {"seed": 0, "reference_size": 8, "ops": [{"op": "pad_crop", "padding": 1}]}
    )
    assert view_fingerprint(again, open_source("digits:train")) == fingerprints[0]
    assert fingerprints[0] == "726caf734bdee82d7ddca5522c1e10d81a44351d12e2678a9e1da5fbd2815d70"


def test_canonical_json_spells_equal_values_equally():
    left = {"b": (1, 2.5), "a": {"y": None, "x": "é"}}
    right = {"a": {"x": "é"}, "b": [1, 2.5], "c": None}
    assert canonical_json(left) == canonical_json(right) == '{"a":{"x":"\\u00e9"},"b":[1,2.5]}'
    assert fingerprint(left) == fingerprint(right) != fingerprint({**left, "d": 0})
    assert canonical_json([None, 1]) == "[null,1]"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_canonical_json_refuses_what_json_cannot_carry(value):
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"a": [value]})


@settings(max_examples=50, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_canonical_floats_are_exact(value):
    assert float(canonical_json(value)) == value


def test_differences_name_every_leaf():
    left = {"same": 1, "seed": 0, "ops": [{"op": "a"}, 2], "gone": "x", "kind": 1}
    right = {"same": 1, "seed": 1, "ops": [{"op": "b"}], "kind": True, "none": None}
    assert differences(left, left) == []
    table = difference_table(left, right, "store", "recipe")
    assert [line.split() for line in table.splitlines()] == [
        ["gone", "store:", "x", "recipe:", "-"],
        ["kind", "store:", "1", "recipe:", "true"],
        ["ops[0].op", "store:", "a", "recipe:", "b"],
        ["ops[1]", "store:", "2", "recipe:", "-"],
        ["seed", "store:", "0", "recipe:", "1"],
    ]
