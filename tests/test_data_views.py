"""Views: a pure function of (seed, sample, view), rendered as independent float64 references say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import random_source
from hypothesis import given, settings
from hypothesis import strategies as st

from coursepack.canonical import canonical_json, difference_table, differences, fingerprint
from coursepack.config import write_yaml
from coursepack.data import PRESETS, Batch, ViewRecipe, open_source, view_fingerprint, view_recipe
from coursepack.data.batches import Window, batches, epoch_order
from coursepack.data.views import GRID, PadCrop, ViewParams, draw, render
from coursepack.errors import RecipeError, UnknownName

CPU = torch.device("cpu")
DIGITS = PRESETS["digits"]
TWO_OPS = ViewRecipe(ops=(PadCrop(padding=2), PadCrop(padding=1)), reference_size=8)


def drawn_in_batches(recipe, samples, view, batch_size):
    chunks = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
    return np.concatenate([draw(recipe, chunk, view).boxes for chunk in chunks])


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
    alone = draw(TWO_OPS, np.arange(1442), view)
    boxes = drawn_in_batches(TWO_OPS, order, view, batch_size)
    assert np.array_equal(boxes, alone.boxes[order])
    expected = render(source, order, ViewParams(alone.boxes[order]), size)
    several = batches(source, TWO_OPS, order, view=view, batch_size=batch_size, device=CPU)
    pixels = np.concatenate([batch.pixels(size).numpy() for batch in several])
    assert np.array_equal(pixels, expected)


def test_epochs_see_every_sample_once_with_its_own_pixels():
    source = open_source("digits")
    everything = np.arange(1442)
    whole = render(source, everything, draw(DIGITS, everything, 3), 8)
    orders = []
    for epoch, batch_size in ((0, 64), (0, 1024), (1, 64)):
        order = epoch_order(everything, seed=5, epoch=epoch)
        several = list(batches(source, DIGITS, order, view=3, batch_size=batch_size, device=CPU))
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
        expected = render(source, one, draw(DIGITS, one, view), 8)
        assert np.array_equal(batch.pixels(8)[row].numpy(), expected[0])


def test_shifts_cover_the_padding_evenly_and_views_differ():
    samples = np.arange(2000)
    shifts = draw(DIGITS, samples, 0).boxes[:, :2] * 8 / GRID
    for axis in range(2):
        values, counts = np.unique(shifts[:, axis], return_counts=True)
        assert values.tolist() == [-1, 0, 1]
        assert counts.min() > 580
    assert abs(np.corrcoef(shifts.T)[0, 1]) < 0.08
    digests = {draw(DIGITS, samples, view).digest() for view in range(20)}
    assert len(digests) == 20


def test_padding_is_meant_in_pixels_of_the_reference_frame():
    at_8 = ViewRecipe(ops=(PadCrop(padding=1),), reference_size=8)
    at_16 = ViewRecipe(ops=(PadCrop(padding=1),), reference_size=16)
    assert np.array_equal(
        draw(at_8, np.arange(99), 0).boxes[:, :2], draw(at_16, np.arange(99), 0).boxes[:, :2] * 2
    )


def test_ops_of_a_recipe_draw_apart():
    first = ViewRecipe(ops=TWO_OPS.ops[:1], reference_size=8)
    samples = np.arange(300)
    second_shift = (draw(TWO_OPS, samples, 0).boxes - draw(first, samples, 0).boxes)[:, :2] * 8 // GRID
    assert set(np.unique(second_shift)) == {-1, 0, 1}
    same_words = draw(ViewRecipe(ops=TWO_OPS.ops[1:], reference_size=8), samples, 0).boxes[:, :2] * 8 // GRID
    assert not np.array_equal(second_shift, same_words)


def test_digits_never_draw_other_views():
    # These literals were drawn by the first release; another value breaks every store.
    assert draw(DIGITS, np.arange(1442), 0).digest() == "4b2289c3"
    assert draw(TWO_OPS, np.arange(1442), 7).digest() == "c989d52c"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shift", [(0, 0), (1, -1), (-3, 2), (7, 7), (8, 0), (0, -9)])
def test_whole_pixel_shift_is_an_exact_copy_with_black_outside(channels, shift):
    source = random_source(3, channels=channels)
    boxes = np.array([[shift[0] * GRID // 8, shift[1] * GRID // 8, GRID, GRID]] * 3, dtype=np.int32)
    pixels = render(source, np.arange(3), ViewParams(boxes), 8)
    framed = np.pad(source.images, ((0, 0), (9, 9), (9, 9), (0, 0)))
    assert np.array_equal(pixels, framed[:, 9 + shift[0] : 17 + shift[0], 9 + shift[1] : 17 + shift[1]])


def bilinear(image, box, size):
    """Bilinear crop of one image `(H, W, C)` in float64: pixel centres at half, zero outside the image."""
    top, left, height, width = np.asarray(box, dtype=np.float64) / GRID
    framed = np.pad(image.astype(np.float64), ((1, 1), (1, 1), (0, 0)))

    def matrix(start, length, source):
        place = (start + (np.arange(size) + 0.5) / size * length) * source - 0.5
        # Hat functions centred on each framed source pixel, -1 to `source`.
        return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(-1, source + 1)))

    rows, columns = matrix(top, height, image.shape[0]), matrix(left, width, image.shape[1])
    return np.einsum("yh,hwc,xw->yxc", rows, framed, columns)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(*[st.integers(-GRID, GRID)] * 2, *[st.integers(1, 2 * GRID)] * 2),
    st.integers(1, 40),
    st.sampled_from([1, 3, 8, 29]),
    st.sampled_from([1, 3]),
    st.integers(0, 9),
)
def test_any_crop_at_any_size_equals_the_float64_reference(box, size, side, channels, seed):
    source = random_source(1, size=side, channels=channels, seed=seed)
    pixels = render(source, np.array([0]), ViewParams(np.array([box], dtype=np.int32)), size)
    error = np.abs(pixels[0] - bilinear(source.images[0], box, size))
    # Rounding once, and 255 times half a step of 2**-11 in the weights of each of two axes.
    assert error.max() <= 0.5 + 2 * 255 * 2.0**-12 + 1e-9


@pytest.mark.parametrize("name", PRESETS)
def test_recipe_from_yaml_is_the_preset(tmp_path, name):
    file = tmp_path / "view.yaml"
    file.write_text(write_yaml(PRESETS[name].model_dump(mode="json")))
    assert view_recipe(str(file)) == view_recipe(name) == PRESETS[name]
    assert view_recipe(str(file), seed=4) == PRESETS[name].model_copy(update={"seed": 4})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ops: [{op: pad_crop, padding: 0}]", r"ops\.0\.padding: .*greater than or equal to 1, got 0"),
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
    again = ViewRecipe.model_validate({"seed": 0, "reference_size": 8, "ops": [{"padding": 1}]})
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
