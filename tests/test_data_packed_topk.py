"""The packed top-k encoding: what it keeps, how large it is, and damage that is noticed."""

from __future__ import annotations

import contracts_encodings as contract
import numpy as np
import pytest
import torch
from encoded_rows import encoded_as
from helpers import write_rows

from coursepack.data.encodings import encoding_from_dict, parse_encoding, row_bytes
from coursepack.data.store import StoreReader
from coursepack.errors import RecipeError, StoreMismatch
from coursepack.kernels import PackedTopKRows, TopKRows, soft_target_loss
from coursepack.kernels.packed import low_bits


def normal(shape, *, seed=0, scale=5.0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


@pytest.mark.parametrize("label", ["best", "worst", "kept last", "dropped first"])
@pytest.mark.parametrize("spec", ["topk:2", "topk:3", "topk:10", "topk:10,label=no"])
def test_the_label_is_kept_wherever_it_ranks_unless_it_need_not_be(spec, label):
    values, k = normal((20, 30)), contract.entries_of(spec)
    rank = {"best": 0, "worst": 29, "kept last": k - 1, "dropped first": k}[label]
    contract.check_packed(spec, values, np.argsort(-values, axis=1)[:, rank])


def test_a_label_among_the_largest_costs_nothing():
    values = normal((20, 30))
    labels = np.argsort(-values, axis=1)[:, 4]
    kept, free = (contract.encode(spec, values, labels) for spec in ("topk:5", "topk:5,label=no"))
    assert all(np.array_equal(kept[part], free[part]) for part in kept)


ROWS = {
    "one giant": [32752.0, *[-32752.0] * 11],
    "one dwarf": [-32752.0, *[32752.0] * 11],
    "all the same": [1.5] * 12,
    "two values": [0.0, 1.0] * 6,
    "steps beyond float16": [float(-30000 * (i % 2) + i) for i in range(12)],
    "equal but for float32": [1 + i * 1e-7 for i in range(12)],
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("k", [2, 5, 11, 12])
def test_extremes(k, row):
    contract.check_packed(f"topk:{k}", np.array([row] * 12, dtype=np.float32), np.arange(12))


@pytest.mark.parametrize("classes", [11, 32, 33, 64, 65, 257, 21841, 65537])
def test_any_number_of_classes(classes):
    values = normal((3, classes))
    values[0, -1] = 40
    contract.check_packed("topk:10", values, np.array([0, classes - 1, classes // 2]))


SIZES = [(10, 3, 12), (100, 18, 32), (100, 33, 48), (1000, 13, 32), (1000, 24, 48), (1000, 64, 104),
         (1000, 150, 208), (21841, 10, 32), (21841, 102, 208)]  # fmt: skip


@pytest.mark.parametrize(("classes", "k", "size"), SIZES)
def test_most_entries_that_fit_a_size(classes, k, size):
    assert row_bytes(parse_encoding(f"topk:{k}"), (classes,)) <= size
    assert row_bytes(parse_encoding(f"topk:{k + 1}"), (classes,)) > size


def test_as_many_entries_are_as_near_as_those_of_topk16_in_half_the_bytes():
    """Logits of a heavy tail, which sparse rows do worst at."""
    values = normal((64, 1000), scale=2.0)
    labels = values.argmax(1)
    errors = []
    for spec in ("topk:24", "topk16:24"):
        stored = contract.encode(spec, values, labels)
        at = torch.full((64,), 4.0)
        decoded = contract.read(spec, stored, (1000,)).decode(at)
        errors.append(float(soft_target_loss(decoded, [torch.from_numpy(values)], temperature=4.0).mean()))
    assert errors[0] <= 1.01 * errors[1]
    assert row_bytes(parse_encoding("topk:24"), (1000,)) * 2 < row_bytes(parse_encoding("topk16:24"), (1000,))


@pytest.mark.parametrize("classes", [25, 130])
def test_every_bit_of_a_row_counts(classes):
    values = normal((8, classes))
    stored = contract.encode("topk:5", values, values.argmax(1))
    agrees = parse_encoding("topk:5").agrees
    used = 5 * (1 + 6) + {25: 5 * 2 + 6, 130: 5 * 4 + 8}[classes]
    for bit in range(used):
        changed = {name: part.copy() for name, part in stored.items()}
        changed["entries"][5, bit // 8] ^= 1 << bit % 8
        assert agrees(values, changed, 0.0).tolist() == [n != 5 for n in range(8)], bit


@pytest.mark.parametrize("column", range(4))
@pytest.mark.parametrize("quanta", [-8, 8])
def test_a_scale_that_is_off_does_not_agree(column, quanta):
    values = normal((8, 25))
    stored = contract.encode("topk:3", values)
    stored["scale"].view(np.int16)[5, column] += quanta
    agrees = parse_encoding("topk:3").agrees
    assert agrees(values, stored, 0.0).tolist() == [n != 5 for n in range(8)]


UNSOUND = {
    "none": lambda _: b"\0" * 6,
    "too many": lambda _: b"\xff" * 6,
    "beyond the last class": lambda ids: contract.packed(
        np.array([[*ids[:4], 27]]), np.zeros((1, 5), int), 25
    ),
    "one twice": lambda ids: contract.packed(np.array([[*ids[:4], ids[3]]]), np.zeros((1, 5), int), 25),
}


@pytest.mark.parametrize("change", UNSOUND.values(), ids=UNSOUND)
def test_ids_that_are_no_ascending_classes_make_no_rows(change):
    values = normal((8, 25))
    values[5, 3] = 30
    stored = contract.encode("topk:5", values, values.argmax(1))
    ids, _ = contract.unpacked(stored["entries"][5], 5, 25)
    row = np.frombuffer(bytes(change([*sorted({*ids, 20})[:4], 24])), dtype=np.uint8)
    stored["entries"][5] = np.resize(row, stored["entries"].shape[1])
    assert parse_encoding("topk:5").agrees(values, stored, 0.0).tolist() == [n != 5 for n in range(8)]
    text = r"entries hold no 5 ascending class ids in row 5, expected ids 0\.\.24"
    with pytest.raises(ValueError, match=text):
        contract.read("topk:5", stored, (25,))


def test_both_forms_are_read_and_neither_is_written_into_the_other(tmp_path):
    for spec, kind in (("topk16:2", TopKRows), ("topk:2", PackedTopKRows)):
        path = tmp_path / spec.replace(":", "")
        write_rows(path, encoded_as(spec, samples=20))
        reader = StoreReader(path)
        assert reader.manifest.arrays["logits"].encoding.name == spec
        assert isinstance(reader.rows("logits", 0, np.arange(20)), kind)
    assert encoding_from_dict({"name": "topk", "k": 2}).name == "topk16:2"
    with pytest.raises(StoreMismatch, match=r"Use another --store, or --encoding topk16:2\.$"):
        write_rows(tmp_path / "topk162", encoded_as("topk:2", samples=20))


def test_a_manifest_with_another_label_option_is_refused():
    with pytest.raises(RecipeError, match="label of encoding topk is 'no', expected true or false"):
        encoding_from_dict({"name": "packed_topk", "k": 2, "label": "no"})


@pytest.mark.parametrize("classes", [1, 2, 9, 64, 65, 100, 1000, 1024, 21841])
def test_ids_have_as_many_low_bits_as_make_the_shortest_rows(classes):
    for kept in {*range(1, min(classes, 40) + 1), classes}:
        sizes = [kept * low + ((classes - 1) >> low) for low in range(20)]
        assert low_bits(classes, kept) == sizes.index(min(sizes))


@pytest.mark.parametrize("samples", [0, 1, 7])
def test_rows_decode_at_temperature_one_unless_another_is_given(samples):
    encoding, values = parse_encoding("topk:3"), normal((samples, 25))
    labels = np.zeros(samples, np.int64)
    parts = encoding.encode(values, np.arange(samples), labels)
    rows = encoding.rows({name: torch.from_numpy(part) for name, part in parts.items()}, (25,))
    assert torch.equal(rows.decode(), rows.decode(torch.ones(samples)))
    assert samples == 0 or not torch.equal(rows.decode(), rows.decode(torch.full((samples,), 4.0)))
