"""Encodings: the contract of all, and what each refuses."""

from __future__ import annotations

import contracts_encodings as contract
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from coursepack.data.encodings import (
    ENCODINGS,
    FOR_FEATURES,
    FOR_LOGITS,
    NAMES,
    encoding_from_dict,
    parse_encoding,
    smaller_encoding,
)
from coursepack.errors import EncodingRange, RecipeError, UnknownName

EACH = pytest.mark.parametrize("spec", contract.SPECS)
EACH_CASE = pytest.mark.parametrize(("spec", "row_shape"), contract.CASES, ids=str)


def normal(shape, *, seed=0, scale=5.0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def test_every_encoding_is_tested_and_for_something():
    assert contract.FAMILY.keys() == set(NAMES)
    assert {contract.STORED_NAMES.get(name, name) for name in NAMES} == ENCODINGS.keys()
    assert {*FOR_LOGITS, *FOR_FEATURES} == set(NAMES)


@EACH
def test_description(spec):
    contract.check_description(spec)


@EACH_CASE
def test_components(spec, row_shape):
    contract.check_components(spec, row_shape)


@pytest.mark.parametrize("spec", [spec for spec in contract.SPECS if contract.takes(spec, (7,))])
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_values(spec, data):
    limit = float(np.float32(contract.FAMILY[spec.partition(":")[0]].limit))
    values = data.draw(arrays(np.float32, (3, 7), elements=st.floats(-limit, limit, width=32)))
    contract.check_values(spec, values)


@EACH_CASE
@pytest.mark.parametrize("scale", [1e-8, 1e-5, 1.0, 1e4])
def test_values_at_every_magnitude(spec, row_shape, scale):
    values = np.random.default_rng(0).uniform(-scale, scale, (12, *row_shape)).astype(np.float32)
    contract.check_values(spec, values)


@EACH
@pytest.mark.parametrize("middle", [-3000.0, 7.0, 20000.0])
def test_values_far_from_zero(spec, middle):
    contract.check_values(spec, middle + normal((12, 111)))


@pytest.mark.parametrize("value", [0.0, -0.0, 2.5, -7.3, 1e-30, 3000.1])
@EACH
def test_equal_values(spec, value):
    contract.check_values(spec, np.full((3, 120), value, dtype=np.float32))


@EACH_CASE
@pytest.mark.parametrize("change", ["read-only", "strided"])
def test_memory_of_any_kind_is_encoded(spec, row_shape, change):
    values = normal((12, *row_shape))
    given = values[::2]
    if change == "read-only":
        given = given.copy()
        given.flags.writeable = False
    contract.check_values(spec, given)


def test_float32_is_exact_everywhere():
    edges = [0.0, -0.0, 1e-45, 3.4028235e38, -3.4028235e38, 1e-38, 65520.0]
    values = np.array([edges], dtype=np.float32)
    assert contract.roundtrip("float32", values).tobytes() == values.tobytes()


def test_float16_keeps_every_float16():
    codes = np.arange(2**16, dtype=np.uint16).view(np.float16)
    values = codes[np.isfinite(codes)].astype(np.float32)[None]
    assert contract.roundtrip("float16", values).tobytes() == values.tobytes()


def test_bfloat16_is_the_upper_half_of_float32_rounded_to_even():
    codes = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)
    values = codes[np.isfinite(codes)][None]
    stored = contract.encode("bfloat16", values)["values"]
    assert np.array_equal(stored[0], values[0].view(np.uint32) >> 16)
    assert contract.roundtrip("bfloat16", values).tobytes() == values.tobytes()
    halfway = np.array([[1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20]], dtype=np.float32)
    assert contract.roundtrip("bfloat16", halfway).tolist() == [[1, 1 + 2**-6, 1 + 2**-7]]


def test_int8_uses_the_whole_range_of_each_row():
    values = np.stack([np.linspace(0, 1, 300), np.linspace(-4, 2000, 300)]).astype(np.float32)
    stored = contract.encode("int8", values)
    assert stored["q"].min(1).tolist() == [0, 0]
    assert stored["q"].max(1).tolist() == [255, 255]
    assert stored["affine"][:, 0].tolist() == contract.affine_step(values, 255)[:, 0].tolist()
    assert stored["affine"][:, 1].tolist() == [0, -4]


@settings(max_examples=200, deadline=None)
@given(arrays(np.float32, (1, 5), elements=st.floats(-32752, 32752, width=32)))
@example(np.array([[0, 0, 0, 0, 1e-45]], dtype=np.float32))
def test_int8_reaches_every_value_of_its_row(values):
    scale, minimum = contract.encode("int8", values)["affine"][0].astype(np.float64)
    assert minimum <= values.min()
    assert minimum + 255 * scale >= values.max() - 2.0**-20 * np.abs(values).max()


def test_bits_are_packed_from_the_highest():
    values = np.array([[1, -1, 0, -0.0, 2, 1e-45, -3, 4, 5, -6, 7]], dtype=np.float32)
    assert contract.encode("bits", values)["bits"].tolist() == [[0b10001101, 0b10100000]]


@pytest.mark.parametrize("label", ["best", "worst", "kept last", "dropped first"])
@pytest.mark.parametrize("k", [2, 3, 10])
def test_topk_keeps_the_label_wherever_it_ranks(k, label):
    values = normal((20, 30))
    rank = {"best": 0, "worst": 29, "kept last": k - 1, "dropped first": k}[label]
    contract.check_topk(f"topk16:{k}", values, np.argsort(-values, axis=1)[:, rank])


TOPK_ROWS = {
    "one giant": [65504.0, *[-65504.0] * 11],
    "one dwarf": [-65504.0, *[65504.0] * 11],
    "all the same": [1.5] * 12,
    "two values": [0.0, 1.0] * 6,
    "steps beyond float16": [float(-60000 * (i % 2) + i) for i in range(12)],
    "equal but for float32": [1 + i * 1e-7 for i in range(12)],
}


@pytest.mark.parametrize("row", TOPK_ROWS.values(), ids=TOPK_ROWS)
@pytest.mark.parametrize("k", [2, 5, 11, 12])
def test_topk_extremes(k, row):
    values = np.array([row] * 12, dtype=np.float32)
    contract.check_topk(f"topk16:{k}", values, np.arange(12))


def test_topk_of_all_classes_drops_nothing():
    values = normal((6, 10))
    stored = contract.encode("topk16:10", values)
    assert (stored["tail"] == -65504).all()
    assert np.array_equal(contract.roundtrip("topk16:10", values), values.astype(np.float16))


@pytest.mark.parametrize(
    ("classes", "dtype"), [(21841, "uint16"), (65536, "uint16"), (65537, "uint32"), (70000, "uint32")]
)
def test_topk_of_many_classes(classes, dtype):
    values = normal((3, classes))
    values[0, -1] = 40
    assert parse_encoding("topk16:10").components((classes,))["ids"].dtype == dtype
    contract.check_topk("topk16:10", values, np.array([0, classes - 1, classes // 2]))


RANGES = {
    "float16": ("65504", "float32 or bfloat16", [65520.0, -65520.0, 1e30, -3.4e38]),
    "bfloat16": ("3.38953e+38", "float32", [3.4e38, -3.4e38]),
    "int8": ("32752", "float32 or bfloat16", [32753.0, -32753.0, 65504.0, 1e30]),
    "int4": ("32752", "float32 or bfloat16", [32753.0, -32753.0, 1e30]),
    "topk:3": ("32752", "float32 or bfloat16", [32753.0, -65504.0, 1e30]),
    "topk16:3": ("65504", "float32 or bfloat16", [65505.0, -65520.0, 1e30]),
}


@pytest.mark.parametrize("row_shape", [(10,), (2, 3, 4)], ids=str)
@pytest.mark.parametrize(
    ("spec", "value"), [(spec, value) for spec, case in RANGES.items() for value in case[2]]
)
def test_out_of_range_names_the_sample_and_the_way_out(spec, value, row_shape):
    limit, others, _ = RANGES[spec]
    values = np.zeros((5, *(row_shape if contract.takes(spec, row_shape) else (24,))), dtype=np.float32)
    values[3].reshape(-1)[4] = value
    values[4].reshape(-1)[0] = 2 * value if abs(value) < 1e38 else value
    with pytest.raises(EncodingRange) as refusal:
        parse_encoding(spec).encode(values, np.arange(100, 105), np.zeros(5, dtype=np.int64))
    assert str(refusal.value) == (
        f"sample 103 has the value {value:g}, outside the range of {spec} (+-{limit}): use {others}"
    )


def test_float16_holds_what_rounds_to_its_largest_value():
    values = np.array([[65519.996, -65519.996]], dtype=np.float32)
    assert contract.roundtrip("float16", values).tolist() == [[65504, -65504]]


@pytest.mark.parametrize("spec", ["int8", "int4", "topk:3", "topk16:3", "bits"])
def test_the_largest_values_are_held(spec):
    limit = contract.FAMILY[spec.partition(":")[0]].limit
    contract.check_values(spec, np.array([[limit, -limit, 0, 1, limit / 2]] * 3, dtype=np.float32))


def quanta(stored, part, place, count):
    """Components with one stored number moved by some units of its own format."""
    changed = {name: array.copy() for name, array in stored.items()}
    bits = changed[part].view(f"u{changed[part].dtype.itemsize}")
    bits[place] = bits[place] + count if bits[place] < 200 or bits.itemsize > 1 else bits[place] - count
    return changed


@pytest.mark.parametrize("spec", ["float32", "float16", "bfloat16", "int8", "int4", "topk16:3"])
@pytest.mark.parametrize("row", [0, 7])
def test_a_value_that_is_off_does_not_agree(spec, row):
    values = normal((8, 25), seed=row)
    values += np.sign(values)
    stored = contract.encode(spec, values)
    agrees = parse_encoding(spec).agrees
    part = "q" if spec in ("int8", "int4") else "values"
    for column in range(stored[part].shape[1]):
        found = agrees(values, quanta(stored, part, (row, column), 4), 0.0)
        assert found.tolist() == [n != row for n in range(8)]


@pytest.mark.parametrize(("column", "quanta_off"), [(0, 16), (1, 200)])
def test_an_int8_row_of_another_scale_or_minimum_does_not_agree(column, quanta_off):
    values = normal((8, 25))
    stored = contract.encode("int8", values)
    found = parse_encoding("int8").agrees(values, quanta(stored, "affine", (5, column), quanta_off), 0.0)
    assert found.tolist() == [n != 5 for n in range(8)]


@pytest.mark.parametrize("column", [0, 1])
def test_an_int4_row_of_another_top_or_range_does_not_agree(column):
    values = normal((8, 25))
    found = parse_encoding("int4").agrees(
        values, quanta(contract.encode("int4", values), "scale", (5, column), 4), 0.0
    )
    assert found.tolist() == [n != 5 for n in range(8)]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_int4_refuses_what_has_no_gap(value):
    values = normal((2, 5))
    values[1, 2] = value
    with pytest.raises(EncodingRange, match=r"sample 1 has the value -?(nan|inf), outside the range of int4"):
        contract.encode("int4", values)


def test_int4_codes_of_two_halves_share_bytes():
    values = np.array([[0, -450, -16, -34, -54]], dtype=np.float32)
    stored = contract.encode("int4", values)
    assert stored["q"].tolist() == [[0 | 2 << 4, 15 | 3 << 4, 1]]
    assert stored["scale"].tolist() == [[0, 450]]
    assert contract.roundtrip("int4", values).round(3).tolist() == values.tolist()


@pytest.mark.parametrize("lower", [[5.0], [1e-6, 5.0], [1e-9]], ids=str)
def test_int4_rows_of_equal_logits_agree_though_the_lowest_are_raised(lower):
    values = np.zeros((3, 100), dtype=np.float32)
    values[1, : len(lower)] -= lower
    stored = contract.encode("int4", values)
    assert stored["scale"].tolist() == [[0, 2.0**-24]] * 3
    assert parse_encoding("int4").agrees(values, stored, 0.0).all()
    assert np.abs(contract.roundtrip("int4", values)).max() <= 2.0**-24


@pytest.mark.parametrize("row_shape", [(10, 2), ()], ids=str)
def test_int4_is_for_logits(row_shape):
    with pytest.raises(RecipeError, match=r"encoding int4 is for logits, got rows \("):
        parse_encoding("int4").components(row_shape)


@pytest.mark.parametrize("column", range(4))
def test_a_topk_tail_that_is_off_does_not_agree(column):
    values = normal((8, 25))
    stored = contract.encode("topk16:3", values)
    agrees = parse_encoding("topk16:3").agrees
    assert agrees(values, quanta(stored, "tail", (5, column), 4), 0.0).tolist() == [n != 5 for n in range(8)]


def exchanged(stored, values):
    stored["ids"][5, [0, 1]] = stored["ids"][5, [1, 0]]


def foreign(stored, values):
    stored["ids"][5, 1] = next(c for c in range(25) if c not in stored["ids"][5])


def worst_for_best(stored, values):
    stored["ids"][5, 0] = values[5].argmin()
    stored["values"][5, 0] = values[5].min()


def one_twice(stored, values):
    stored["ids"][5, 1], stored["values"][5, 1] = stored["ids"][5, 0], stored["values"][5, 0]


def retailed(change):
    """The same change, with the tail that belongs to the ids it leaves."""

    def change_both(stored, values):
        change(stored, values)
        ids = stored["ids"][5].astype(int)
        dropped = np.delete(values[5], ids).astype(np.float64) - values[5].max()
        stored["tail"][5] = [contract.log_sum_exp(dropped / t) for t in contract.TEMPERATURES]

    change_both.__name__ = f"{change.__name__} with its tail"
    return change_both


def two_worst(stored, values):
    stored["ids"][5, 1:] = np.argsort(values[5])[:2]
    stored["values"][5] = values[5, stored["ids"][5]]


def no_class(stored, values):
    stored["ids"][5, 1] = values.shape[1]


def far_from_a_class(stored, values):
    stored["ids"][5] = 65535


CHANGES = [
    no_class,
    far_from_a_class,
    exchanged,
    foreign,
    worst_for_best,
    one_twice,
    retailed(one_twice),
    retailed(two_worst),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_other_topk_ids_do_not_agree(change):
    values = normal((8, 25))
    stored = contract.encode("topk16:3", values, values.argmax(1))
    change(stored, values)
    assert parse_encoding("topk16:3").agrees(values, stored, 0.0).tolist() == [n != 5 for n in range(8)]


@pytest.mark.parametrize("change", [no_class, far_from_a_class], ids=lambda change: change.__name__)
def test_topk_ids_that_are_no_class_make_no_rows(change):
    values = normal((8, 25))
    stored = contract.encode("topk16:3", values)
    change(stored, values)
    with pytest.raises(ValueError, match=rf"ids holds {stored['ids'][5, 1]}, expected class ids 0\.\.24"):
        contract.read("topk16:3", stored, (25,))


def test_a_flipped_bit_does_not_agree():
    values = normal((8, 19))
    stored = contract.encode("bits", values)["bits"]
    for column in range(19):
        changed = stored.copy()
        changed[5, column // 8] ^= 128 >> column % 8
        found = parse_encoding("bits").agrees(values, {"bits": changed}, 0.0)
        assert found.tolist() == [n != 5 for n in range(8)]


@EACH
def test_answers_that_moved_by_less_than_the_slack_agree(spec):
    values = normal((40, 120), seed=3)
    moved = values + np.random.default_rng(4).uniform(-1, 1, values.shape).astype(np.float32) * 0.9e-3 * (
        np.abs(values).max(1, keepdims=True)
    )
    stored = contract.encode(spec, values)
    agrees = parse_encoding(spec).agrees
    assert agrees(values, stored, 0.0).all()
    assert agrees(moved, stored, 1e-3).all()
    assert not agrees(0.5 - values, stored, 1e-3).any()
    assert not agrees(np.roll(values, 1, axis=0), stored, 1e-3).any()


@pytest.mark.parametrize("values", [{"name": "float61"}, {}])
def test_unknown_encoding_is_refused(values):
    with pytest.raises(UnknownName, match=r"unknown encoding .* Known: float32, float16, bfloat16, int8, "):
        encoding_from_dict(values)


@pytest.mark.parametrize(
    ("text", "known", "error", "message"),
    [
        ("float17", FOR_LOGITS, UnknownName, r"unknown encoding 'float17'\. Did you mean 'float1?6?.*'\?"),
        ("", FOR_LOGITS, UnknownName, "unknown encoding ''"),
        ("bits", FOR_LOGITS, UnknownName, "unknown encoding 'bits'.* Known: float32, .*, topk"),
        ("topk:3", FOR_FEATURES, UnknownName, "unknown encoding 'topk'.* Known: float32, .*, bits"),
        ("topk16:3", FOR_FEATURES, UnknownName, "unknown encoding 'topk16'.* Known: float32, .*, bits"),
        (
            "topk",
            FOR_LOGITS,
            RecipeError,
            "'topk' has no number of entries to keep, expected topk:K such as topk:10",
        ),
        ("topk:", FOR_LOGITS, RecipeError, "'topk:' has no number of entries"),
        ("topk:-3", FOR_LOGITS, RecipeError, "'topk:-3' has no number of entries"),
        ("topk:1.5", FOR_LOGITS, RecipeError, "'topk:1.5' has no number of entries"),
        ("topk:²", FOR_LOGITS, RecipeError, "'topk:²' has no number of entries"),
        ("topk:3:4", FOR_LOGITS, RecipeError, "'topk:3:4' has no number of entries"),
        ("topk16", FOR_LOGITS, RecipeError, "'topk16' has no number of entries to keep, expected topk16:K"),
        ("topk:3,", FOR_LOGITS, RecipeError, "has the unknown option '', expected topk:K or topk:K,label=no"),
        (
            "topk:3,label=none",
            FOR_LOGITS,
            RecipeError,
            "has the unknown option 'label=none', expected topk:K",
        ),
        ("topk16:3,label=no", FOR_LOGITS, RecipeError, "unknown option 'label=no', expected topk16:K$"),
        ("topk:1", FOR_LOGITS, RecipeError, "topk keeps 1 entries, expected at least 2: the top class and"),
        ("int8:4", FOR_LOGITS, RecipeError, "encoding 'int8' takes no parameter, got 'int8:4'"),
        ("int4:2", FOR_LOGITS, RecipeError, "encoding 'int4' takes no parameter, got 'int4:2'"),
        ("int4", FOR_FEATURES, UnknownName, "unknown encoding 'int4'.* Known: float32, .*, bits"),
        ("bits:8", FOR_FEATURES, RecipeError, "encoding 'bits' takes no parameter, got 'bits:8'"),
    ],
)
def test_wrong_flags_are_refused(text, known, error, message):
    with pytest.raises(error, match=message):
        parse_encoding(text, known)


@pytest.mark.parametrize("spec", ["topk:10", "topk16:10"])
@pytest.mark.parametrize("row_shape", [(9,), (10, 2), ()], ids=str)
def test_topk_is_for_logits_of_enough_classes(row_shape, spec):
    with pytest.raises(RecipeError, match=rf"{spec} is for logits of at least 10 classes, got rows \("):
        parse_encoding(spec).components(row_shape)


@pytest.mark.parametrize(
    ("spec", "classes", "stored"),
    [
        # Eight bytes of scale and some eight bits an entry, against one byte a class and four of scale.
        ("topk:3", 10, "topk:3"),
        ("topk:5", 10, "int8"),
        ("topk:5,label=no", 11, "topk:5,label=no"),
        ("topk:10", 5, "int8"),
        ("topk:94", 100, "topk:94"),
        ("topk:95", 100, "int8"),
        ("topk:100", 1000, "topk:100"),
        ("topk:100", 21841, "topk:100"),
        # Four bytes an entry and eight of tail, against two a class.
        ("topk16:3", 10, "float16"),
        ("topk16:3", 11, "topk16:3"),
        ("topk16:10", 5, "float16"),
        ("topk16:10", 24, "float16"),
        ("topk16:10", 25, "topk16:10"),
        ("topk16:100", 204, "float16"),
        ("topk16:100", 1000, "topk16:100"),
        ("topk16:100", 21841, "topk16:100"),
        # Six an entry, where ids are wide.
        ("topk16:30000", 70000, "float16"),
        ("topk16:20000", 70000, "topk16:20000"),
        ("float32", 10, "float32"),
        ("int8", 2, "int8"),
    ],
)
def test_topk_falls_back_where_it_is_not_smaller(spec, classes, stored):
    assert smaller_encoding(parse_encoding(spec), (classes,)).name == stored


@pytest.mark.parametrize("spec", ["topk:3", "topk16:3"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_sparse_rows_take_one_temperature_or_one_for_each_row(spec, shape):
    rows = contract.read(spec, contract.encode(spec, normal((5, 40))), (40,))
    each = rows.decode(torch.full((5,), 2.0))
    assert torch.equal(rows.decode(torch.full(shape, 2.0)), each)
    with pytest.raises(RuntimeError, match="expanded size"):
        rows.decode(torch.full((4,), 2.0))
