"""Encoded rows: what every kind offers and holds, against float64, and the loss that takes them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from contracts_encodings import INT4_LEVELS, check_topk_decoded, nibbles, packed, paired, tail_logit, unpacked
from reference.loss import soft_target_loss as reference_loss

from coursepack.kernels import (
    BitRows,
    DenseRows,
    Int4Rows,
    Int8Rows,
    PackedTopKRows,
    Rows,
    TopKRows,
    decode,
    soft_target_loss,
)
from coursepack.kernels.cpu.jit_decode import topk_decode
from coursepack.kernels.rows import TAIL_TEMPERATURES

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_rows_decode_exactly(dtype):
    values = torch.linspace(-300, 300, 24).reshape(4, 6).to(dtype)
    values[0, 0], values[1, 1] = float("-inf"), float("nan")
    rows = DenseRows(values)
    assert isinstance(rows, Rows)
    assert rows.shape == (4, 6)
    assert rows.device == torch.device("cpu")
    decoded = rows.decode()
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, values.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(decode(rows), decoded, rtol=0, atol=0, equal_nan=True)


def test_every_float16_code_decodes_to_its_value():
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = codes.view(torch.float16).reshape(256, 256)
    decoded = DenseRows(values).decode().numpy()
    expected = values.numpy().astype("float32")
    assert ((decoded == expected) | (decoded != decoded) & (expected != expected)).all()


def test_float32_rows_are_not_copied():
    values = torch.ones(2, 3)
    assert DenseRows(values).decode().data_ptr() == values.data_ptr()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_decode_of_a_tensor_is_float32(dtype):
    values = torch.tensor([[0.5, -3.0]], dtype=dtype)
    assert torch.equal(decode(values), torch.tensor([[0.5, -3.0]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8, torch.bool], ids=str)
def test_other_dtypes_are_refused(dtype):
    text = rf"dense rows have dtype {dtype}, expected one of float32, float16, bfloat16"
    with pytest.raises(TypeError, match=text):
        DenseRows(torch.zeros(2, 3, dtype=dtype))


def test_rows_move_and_do_not_change():
    rows = DenseRows(torch.ones(2, 3, dtype=torch.float16))
    moved = rows.to("meta", non_blocking=True)
    assert (moved.device.type, moved.shape, moved.values.dtype) == ("meta", (2, 3), torch.float16)
    assert rows.device.type == "cpu"
    with pytest.raises(dataclasses.FrozenInstanceError):
        rows.values = torch.zeros(2, 3)


def test_rows_of_features_keep_their_shape():
    assert DenseRows(torch.zeros(2, 3, 4, 5)).decode().shape == (2, 3, 4, 5)


def int8_rows(shape, seed=0):
    rng = np.random.default_rng(seed)
    q = torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))
    affine = np.stack([rng.uniform(1e-4, 0.2, len(q)), rng.uniform(-40, 3, len(q))], axis=1)
    return Int8Rows(q, torch.from_numpy(affine.astype(np.float16)))


def int4_rows(shape, seed=0):
    """Rows of four bits a class with one code of 0 each."""
    rng = np.random.default_rng(seed)
    rows, classes = shape
    codes = rng.integers(0, 16, shape)
    codes[np.arange(rows), rng.integers(0, classes, rows)] = 0
    scale = np.stack([rng.normal(6, 2, rows), rng.uniform(2, 30, rows)], axis=1).astype(np.float16)
    return Int4Rows(torch.from_numpy(paired(codes)), torch.from_numpy(scale), classes)


def topk_rows(rows=8, k=5, classes=37, seed=0, dtype=np.uint16):
    """Rows as the encoding makes them: each id once, log-masses convex in 1/T and below their limit."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(classes)[:k] for _ in range(rows)])
    logits = rng.normal(0, 4, (rows, classes))
    np.put_along_axis(logits, ids, -np.sort(-rng.normal(6, 2, (rows, k)), axis=1), axis=1)
    others = np.stack([np.delete(row, of) for row, of in zip(logits, ids, strict=True)])
    scaled = (others - logits.max(1, keepdims=True))[:, None] / np.array(TAIL_TEMPERATURES)[:, None]
    tail = np.log(np.exp(scaled).sum(2)) if k < classes else np.full((rows, 4), -65504)
    values = np.take_along_axis(logits, ids, axis=1)
    parts = (ids.astype(dtype), values.astype(np.float16), tail.astype(np.float16))
    return TopKRows(*map(torch.from_numpy, parts), classes)


def packed_rows(rows=8, k=5, classes=37, seed=0):
    """Packed rows with one code of 0 each, and log masses that fall with 1/T."""
    rng = np.random.default_rng(seed)
    ids = np.sort(np.stack([rng.permutation(classes)[:k] for _ in range(rows)]), axis=1)
    codes = rng.integers(0, 64, (rows, k))
    codes[np.arange(rows), rng.integers(0, k, rows)] = 0
    limit = math.log(classes - k) if k < classes else -65000
    fall = rng.uniform(0.2, 1.5, rows)
    top, span = rng.normal(6, 2, rows), rng.uniform(2, 12, rows)
    scale = np.stack([top, span, limit - 3 * fall, limit - fall], axis=1).astype(np.float16)
    entries = packed(ids, codes, classes)
    return PackedTopKRows(torch.from_numpy(entries), torch.from_numpy(scale), k, classes)


def bit_rows(rows=4, row_shape=(3, 7), seed=0):
    width = -(-math.prod(row_shape) // 8)
    bits = np.random.default_rng(seed).integers(0, 256, (rows, width), dtype=np.uint8)
    return BitRows(torch.from_numpy(bits), row_shape)


def plain_packed(rows, out, temperature):
    """Logits of packed rows, written to `out`."""
    for n, row in enumerate(out):
        ids, codes = unpacked(rows.entries[n].numpy(), rows.kept, rows.classes)
        top, span, *tail = rows.scale[n].double().tolist()
        dropped = len(row) - len(ids)
        if dropped:
            row[:] = tail_logit(np.array([top]), np.array(tail), dropped, float(temperature[n]), (1.0, 4.0))
        row[ids] = top - span * (np.array(codes) / 63) ** 2
    return out


def plain(rows, temperature):
    """Logits `(N, C)` float64 of any kind of rows at a temperature per row, written from the definitions."""
    if isinstance(rows, Int8Rows):
        scale, minimum = rows.affine.numpy().astype(np.float64).T
        return minimum[:, None] + scale[:, None] * rows.q.numpy()
    if isinstance(rows, Int4Rows):
        top, span = rows.scale.numpy().astype(np.float64).T
        codes = np.stack([nibbles(row, rows.classes) for row in rows.q.numpy()])
        return top[:, None] - span[:, None] * INT4_LEVELS[codes]
    out = np.empty(rows.shape)
    if isinstance(rows, PackedTopKRows):
        return plain_packed(rows, out, temperature)
    for n, row in enumerate(out):
        values, tail = (part[n].numpy().astype(np.float64) for part in (rows.values, rows.tail))
        row[:] = tail_logit(values, tail, len(row) - len(values), float(temperature[n]))
        row[rows.ids[n].numpy().astype(int)] = values
    return out


EVERY_KIND = {
    "dense": lambda rows: DenseRows(torch.randn(rows, 10, generator=torch.Generator().manual_seed(0))),
    "int8": lambda rows: int8_rows((rows, 10)),
    "int4": lambda rows: int4_rows((rows, 11)),
    "topk": topk_rows,
    "packed": packed_rows,
    "bits": bit_rows,
}


@pytest.mark.parametrize("count", [0, 1, 6])
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_what_every_kind_offers(kind, count):
    rows = EVERY_KIND[kind](6)
    tensors = {f.name: getattr(rows, f.name) for f in dataclasses.fields(rows)}
    rows = dataclasses.replace(rows, **{n: v[:count] for n, v in tensors.items() if torch.is_tensor(v)})
    assert isinstance(rows, Rows)
    decoded = rows.decode()
    assert (len(rows.decode()), decoded.dtype, tuple(decoded.shape)) == (count, torch.float32, rows.shape)
    out = torch.full(rows.shape, float("nan"))
    assert rows.decode(out=out) is out
    assert torch.equal(out, decoded)
    assert torch.equal(decode(rows, torch.ones(count)), decoded)
    assert rows.device == torch.device("cpu")
    moved = rows.to("meta")
    assert (type(moved), moved.device.type, moved.shape) == (type(rows), "meta", rows.shape)
    wrong = [torch.empty(count + 1, *rows.shape[1:]), torch.empty(rows.shape, device="meta")]
    for bad in wrong:
        with pytest.raises(ValueError, match="out"):
            rows.decode(out=bad)
    with pytest.raises(TypeError, match=r"out has dtype torch.float64, expected torch.float32"):
        rows.decode(out=torch.empty(rows.shape, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(5, 10), (3, 1), (4, 3, 2, 5), (2, 1000)], ids=str)
def test_int8_rows_are_affine(shape):
    rows = int8_rows(shape)
    scale, minimum = rows.affine.numpy().astype(np.float64).T
    around = (-1, *[1] * (len(shape) - 1))
    expected = minimum.reshape(around) + scale.reshape(around) * rows.q.numpy()
    assert np.abs(rows.decode().numpy() - expected).max() <= 2.0**-23 * np.abs(expected).max() * 2
    assert torch.equal(rows.decode(torch.full((shape[0],), 4.0)), rows.decode())


@pytest.mark.parametrize("classes", [1, 2, 11, 127, 128, 129, 257, 1000])
def test_int4_rows_are_gaps_below_the_top(classes):
    rows = int4_rows((4, classes))
    expected = plain(rows, None)
    bound = 1e-6 * np.abs(expected).max()
    assert np.abs(rows.decode().numpy() - expected).max() <= bound
    assert torch.equal(rows.decode(torch.full((4,), 4.0)), rows.decode())
    by_torch = rows._decode_unseen(torch.empty(rows.shape))
    assert np.abs(by_torch.numpy() - expected).max() <= bound


@pytest.mark.parametrize("column", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_int4_row_that_is_not_finite_spoils_no_other(value, column):
    rows = int4_rows((8, 37))
    rows.scale[6, column] = value
    for adjustment in ("none", "shift"):
        loss = soft_target_loss(torch.zeros(8, 37), [rows], torch.arange(8), adjustment=adjustment)
        assert torch.equal(loss.isfinite(), torch.arange(8) != 6)


@pytest.mark.parametrize("row_shape", [(1,), (7,), (8,), (9,), (3, 7), (256, 8)], ids=str)
def test_bit_rows_are_signs_from_the_highest_bit(row_shape):
    rows = bit_rows(5, row_shape)
    size = math.prod(row_shape)
    text = ["".join(f"{byte:08b}" for byte in row)[:size] for row in rows.bits.tolist()]
    expected = [[1.0 if bit == "1" else -1.0 for bit in row] for row in text]
    assert rows.decode().reshape(5, size).tolist() == expected


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("k", [2, 5, 36, 37])
def test_topk_rows_at_any_temperature(k, dtype):
    rows = topk_rows(k=k, dtype=dtype)
    stored = {name: getattr(rows, name).numpy() for name in ("ids", "values", "tail")}
    for temperature in (0.02, 0.5, 1.0, 1.5, 2.0, 2.7, 4.0, 5.0, 8.0, 8.1, 30.0, 100.0):
        decoded = rows.decode(torch.full((8,), temperature)).numpy()
        check_topk_decoded(decoded, stored, temperature)
    assert torch.equal(rows.decode(), rows.decode(torch.ones(8)))
    each = torch.tensor([0.02, 0.5, 1.0, 1.5, 2.0, 4.0, 8.0, 100.0])
    together = rows.decode(each)
    for n, temperature in enumerate(each):
        assert torch.equal(together[n], rows.decode(temperature.expand(8))[n])


@pytest.mark.parametrize(
    ("k", "classes"), [(2, 37), (5, 37), (36, 37), (37, 37), (1, 1), (3, 1000), (90, 300)]
)
def test_packed_rows_at_any_temperature(k, classes):
    rows = packed_rows(k=k, classes=classes)
    ids, codes, valid = rows.unpack()
    assert valid.all()
    for n in range(8):
        assert (ids[n].tolist(), codes[n].tolist()) == unpacked(rows.entries[n].numpy(), k, classes)
    for temperature in (0.02, 0.5, 1.0, 1.5, 4.0, 5.0, 30.0, 100.0):
        each = torch.full((8,), temperature)
        expected = plain(rows, each)
        size = np.abs(expected).max() + temperature * 10
        assert np.abs(rows.decode(each).numpy() - expected).max() <= 2e-6 * size
        by_torch = rows._decode_unseen(each, torch.empty(rows.shape))
        assert np.abs(by_torch.numpy() - expected).max() <= 2e-6 * size
    assert torch.equal(rows.decode(), rows.decode(torch.ones(8)))


def test_an_unsound_packed_row_is_refused_and_turns_to_nan_in_the_loss():
    rows = packed_rows()
    entries = rows.entries.clone()
    entries[6] = 0xFF
    wrong = dataclasses.replace(rows, entries=entries)
    text = r"entries hold no 5 ascending class ids in row 6, expected ids 0\.\.36"
    for refuse in (wrong.decode, wrong.check):
        with pytest.raises(ValueError, match=text):
            refuse()
    others = torch.arange(8) != 6
    for adjustment in ("none", "shift"):
        loss = soft_target_loss(torch.zeros(8, 37), [wrong], torch.arange(8), adjustment=adjustment)
        assert torch.equal(loss.isfinite(), others)
    loss = soft_target_loss(torch.zeros(8, 37), [wrong], row_weight=others.float())
    assert loss.isfinite().all()
    found = wrong._decode_unseen(torch.ones(8), torch.empty(rows.shape))
    assert found[6].isnan().any()
    torch.testing.assert_close(found[others], rows.decode()[others])


@pytest.mark.parametrize("k", [2, 36, 37])
def test_compiled_decoder_equals_the_torch_formula(k):
    rows = topk_rows(rows=400, k=k, seed=3)
    rng = np.random.default_rng(4)
    # Tails of any kind, also such as no encoder makes.
    tail = torch.from_numpy(rng.uniform(-30, 9, (400, 4)).astype(np.float16))
    rows = dataclasses.replace(rows, tail=tail)
    some = [*TAIL_TEMPERATURES, 100.0, *10 ** rng.uniform(-1.5, 2, 395)]
    temperature = torch.tensor(some, dtype=torch.float32)
    fill = rows.tail_logit(rows.values.float(), temperature)
    expected = fill[:, None].expand(rows.shape).scatter(1, rows.ids.long(), rows.values.float())
    torch.testing.assert_close(rows.decode(temperature), expected, rtol=1e-5, atol=1e-4)
    fill = rows.tail_logit(rows.values.float(), None)
    expected = fill[:, None].expand(rows.shape).scatter(1, rows.ids.long(), rows.values.float())
    torch.testing.assert_close(rows.decode(), expected, rtol=1e-6, atol=1e-5)
    assert (fill <= rows.values.float().amax(1)).all()


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize(("classes", "bad"), [(37, 37), (37, 65535), (40, 52)])
def test_an_id_outside_is_refused_before_anything_is_written_there(classes, bad, dtype):
    rows = topk_rows(classes=classes, dtype=dtype)
    ids = rows.ids.numpy().copy()
    ids[6, 2] = bad
    wrong = dataclasses.replace(rows, ids=torch.from_numpy(ids))
    text = rf"ids holds {bad} in row 6, expected class ids 0\.\.{classes - 1}"
    with pytest.raises(ValueError, match=text):
        wrong.decode()
    memory = np.full((8, classes + 70_000), np.float32(7))
    knots = np.array([0, 0.125, 0.25, 0.5, 1], dtype=np.float32)
    parts = (ids, rows.values.float().numpy(), rows.tail.float().numpy(), np.ones(8, np.float32), knots)
    assert topk_decode(*parts, memory[:, :classes]) == 6
    assert (memory[:, classes:] == 7).all()
    assert (memory[7] == 7).all()
    assert np.array_equal(memory[:6, :classes], rows.decode().numpy()[:6])


def test_where_ids_are_not_looked_at_a_row_with_one_outside_turns_to_nan():
    rows = topk_rows()
    temperature = torch.linspace(0.5, 8, len(rows.ids))
    expected = rows.decode(temperature)
    ids = rows.ids.numpy().copy()
    ids[6, 2] = rows.classes
    wrong = dataclasses.replace(rows, ids=torch.from_numpy(ids))
    found = wrong._decode_unseen(temperature, torch.empty(rows.shape))
    assert torch.isnan(found[6]).all()
    others = torch.arange(len(ids)) != 6
    torch.testing.assert_close(found[others], expected[others])
    torch.testing.assert_close(rows._decode_unseen(temperature, torch.empty(rows.shape)), expected)


BROKEN = {
    "q of floats": (lambda: Int8Rows(torch.zeros(2, 3), torch.zeros(2, 2).half()), TypeError, "q has dtype"),
    "affine in float32": (
        lambda: Int8Rows(torch.zeros(2, 3).byte(), torch.zeros(2, 2)),
        TypeError, "affine has dtype torch.float32",
    ),
    "affine of other rows": (
        lambda: Int8Rows(torch.zeros(2, 3).byte(), torch.zeros(3, 2).half()),
        ValueError, r"affine has shape \(3, 2\), expected \(2, 2\)",
    ),
    "codes of other classes": (
        lambda: Int4Rows(torch.zeros(2, 3).byte(), torch.zeros(2, 2).half(), 7),
        ValueError, r"q has shape \(2, 3\), expected \(2, 4\)",
    ),
    "scale in float32": (
        lambda: Int4Rows(torch.zeros(2, 3).byte(), torch.zeros(2, 2), 5),
        TypeError, "scale has dtype torch.float32",
    ),
    "signed ids": (
        lambda: dataclasses.replace(topk_rows(), ids=torch.zeros(8, 5, dtype=torch.int64)),
        TypeError, "ids have dtype torch.int64, expected uint16 or uint32",
    ),
    "values in float32": (
        lambda: dataclasses.replace(topk_rows(), values=torch.zeros(8, 5)), TypeError, "values has dtype",
    ),
    "values of another k": (
        lambda: dataclasses.replace(topk_rows(), values=torch.zeros(8, 4).half()),
        ValueError, r"values has shape \(8, 4\), expected \(8, 5\)",
    ),
    "tail of three": (
        lambda: dataclasses.replace(topk_rows(), tail=torch.zeros(8, 3).half()),
        ValueError, r"tail has shape \(8, 3\), expected \(8, 4\)",
    ),
    "more ids than classes": (
        lambda: dataclasses.replace(topk_rows(), classes=4),
        ValueError, "ids has 5 columns, expected at most 4 classes",
    ),
    "too few entries": (
        lambda: dataclasses.replace(packed_rows(), entries=torch.zeros(8, 6).byte()),
        ValueError, r"entries has shape \(8, 6\), expected \(8, 7\)",
    ),
    "more kept than classes": (
        lambda: dataclasses.replace(packed_rows(), classes=4),
        ValueError, "kept is 5, expected 1 to 4 classes",
    ),
    "scale of three": (
        lambda: dataclasses.replace(packed_rows(), scale=torch.zeros(8, 3).half()),
        ValueError, r"scale has shape \(8, 3\), expected \(8, 4\)",
    ),
    "signed bits": (lambda: BitRows(torch.zeros(2, 1).char(), (8,)), TypeError, "bits has dtype torch.int8"),
    "too few bits": (
        lambda: BitRows(torch.zeros(2, 1).byte(), (9,)),
        ValueError, r"bits has shape \(2, 1\), expected \(2, 2\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("build", "error", "text"), BROKEN.values(), ids=BROKEN)
def test_parts_that_do_not_fit_are_refused(build, error, text):
    with pytest.raises(error, match=text):
        build()


LOSS_OPTIONS = {
    "T of 1": {"temperature": 1.0},
    "T of 4": {"temperature": 4.0},
    "T per row": {"temperature": torch.tensor([0.5, 1.0, 1.7, 3.0, 4.0, 8.0, 11.0, 60.0])},
    "T per teacher": {"temperature": 3.0, "teacher_temperature": [1.0, 6.0]},
    "T per teacher and row": {"teacher_temperature": torch.linspace(0.5, 20, 16).reshape(2, 8)},
    "shift": {"temperature": 4.0, "adjustment": "shift", "hard_weight": 0.3},
    "smooth and shift": {"temperature": 2.0, "adjustment": ["smooth", "shift"], "combine": "sum"},
}


@pytest.mark.parametrize("options", LOSS_OPTIONS.values(), ids=LOSS_OPTIONS)
@pytest.mark.parametrize(
    "kinds",
    [("int8", "topk"), ("topk", "topk"), ("int8", "dense"), ("packed", "topk"), ("int4", "topk")],
    ids="-".join,
)
def test_loss_of_encoded_rows_is_that_of_what_they_mean(kinds, options):
    made = {
        "int8": int8_rows((8, 37)),
        "int4": int4_rows((8, 37)),
        "topk": topk_rows(),
        "packed": packed_rows(),
        "dense": DenseRows(torch.randn(8, 37, generator=torch.Generator().manual_seed(2)).half()),
    }
    teachers = [made[kind] for kind in kinds]
    # Wrong for most rows, and kept by the top-k rows: the last of their entries.
    labels = made["topk"].ids[:, -1].long()
    student = torch.randn(8, 37, generator=torch.Generator().manual_seed(1), requires_grad=True)
    loss = soft_target_loss(student, teachers, labels, **options)
    loss.sum().backward()
    values = {name: v.numpy() if torch.is_tensor(v) else v for name, v in options.items()}
    own = np.broadcast_to(values.get("temperature", 1.0), 8)
    theirs = np.asarray(values.get("teacher_temperature", [own, own]), dtype=np.float64)
    theirs = np.broadcast_to(theirs.reshape(2, -1), (2, 8))
    logits = np.stack(
        [
            rows.values.double().numpy() if isinstance(rows, DenseRows) else plain(rows, theirs[k])
            for k, rows in enumerate(teachers)
        ]
    )
    expected = reference_loss(student.detach().double().numpy(), logits, labels.numpy(), **values)
    assert (np.abs(loss.detach().numpy() - expected.loss) <= 4e-6 * expected.loss_size).all()
    bound = 4e-6 * np.reshape(expected.student_size, (8, -1))
    assert (np.abs(student.grad.numpy() - expected.grad_student) <= bound).all()
    decoded = [decode(rows, torch.from_numpy(theirs[k].copy()).float()) for k, rows in enumerate(teachers)]
    of_decoded = soft_target_loss(student, decoded, labels, **options)
    assert (np.abs((of_decoded - loss).detach().numpy()) <= 1e-6 * expected.loss_size).all()


def test_a_top_k_teacher_read_at_another_temperature_would_differ():
    rows = topk_rows()
    student = torch.zeros(8, 37)
    right = soft_target_loss(student, [rows], temperature=4.0)
    assert not torch.allclose(right, soft_target_loss(student, [rows.decode()], temperature=4.0), rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_decoding_on_cuda_equals_decoding_here(kind):
    rows = EVERY_KIND[kind](6)
    for temperature in (None, torch.tensor([0.3, 1.0, 2.0, 5.0, 8.0, 90.0])):
        there = rows.to("cuda").decode(None if temperature is None else temperature.cuda())
        torch.testing.assert_close(there.cpu(), rows.decode(temperature), rtol=1e-5, atol=1e-5)
