"""Facts about teachers against the float64 reference."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.loss import teacher_stats as reference_stats
from test_kernels_rows import int4_rows, int8_rows, packed_rows, topk_rows

from coursepack.kernels import DenseRows, Rows, teacher_stats

# How far off each fact may be: absolutely, per nat or per unit of the value.
PRECISION = 1e-6


def assert_facts(teachers, labels, student, got, ignore_index=-100):
    """Every fact of every teacher and sample agrees with the reference."""
    for k, logits in enumerate(teachers):
        for n in range(logits.shape[0]):
            label = None if labels is None or labels[n] == ignore_index else int(labels[n])
            other = None if student is None else student[n].double().numpy()
            want = reference_stats(logits[n].double().numpy(), label, other)
            assert got.argmax[k, n] == want["argmax"]
            for name in ("entropy", "norm", "cross_entropy", "cosine"):
                values = getattr(got, name)
                if values is not None:
                    tolerance = PRECISION * (1 + abs(want[name]))
                    assert float(values[k, n]) == pytest.approx(want[name], abs=tolerance), name
            if labels is not None:
                assert bool(got.correct[k, n]) == want["correct"]


def random_teachers(seed, count, rows, classes, scale=3.0):
    rng = np.random.default_rng(seed)
    teachers = torch.from_numpy(rng.normal(size=(count, rows, classes)) * scale).float()
    labels = torch.from_numpy(rng.integers(0, classes, rows))
    for k in range(count):
        teachers[k, 0, labels[0]] = teachers[k, 0].max() + k
    return teachers, labels, torch.from_numpy(rng.normal(size=(rows, classes))).float()


@pytest.mark.parametrize("classes", [2, 10, 1000, 21841])
@pytest.mark.parametrize("scale", [0.1, 3.0, 1e4])
def test_facts_agree_with_the_reference(classes, scale):
    teachers, labels, student = random_teachers(0, 3, 4, classes, scale)
    labels[3] = -100
    got = teacher_stats(teachers, labels, student_logits=student)
    assert_facts(teachers, labels, student, got)
    assert got.correct[:, 0].all()
    assert not got.correct[:, 3].any()
    assert (got.cross_entropy[:, 3] == 0).all()


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 4),
    rows=st.integers(1, 4),
    classes=st.integers(1, 30),
    levels=st.sampled_from([2, 5, 1000]),
)
def test_facts_with_ties(seed, count, rows, classes, levels):
    teachers, labels, student = random_teachers(seed, count, rows, classes)
    teachers = (teachers * levels).round().clamp(-levels, levels) / levels
    teachers[teachers.abs().amax(2) == 0] = 1.0
    assert_facts(teachers, labels, student, teacher_stats(teachers, labels, student_logits=student))


def test_shapes_dtypes_and_what_was_not_asked():
    teachers, labels, student = random_teachers(1, 2, 3, 7)
    bare = teacher_stats(teachers)
    assert bare.correct is bare.cross_entropy is bare.cosine is None
    full = teacher_stats(teachers, labels, student_logits=student)
    for field in dataclasses.fields(full):
        value = getattr(full, field.name)
        expected = {"argmax": torch.int64, "correct": torch.bool}.get(field.name, torch.float32)
        assert value.shape == (2, 3)
        assert value.dtype == expected
    assert torch.equal(bare.entropy, full.entropy)


def test_encoded_rows_and_a_student_in_bfloat16():
    teachers, labels, student = random_teachers(2, 3, 4, 50)
    rows = [DenseRows(teachers[0].half()), teachers[1].bfloat16(), teachers[2].double()]
    got = teacher_stats(rows, labels, student_logits=student.bfloat16().requires_grad_(True))
    decoded = [teachers[0].half(), teachers[1].bfloat16(), teachers[2]]
    assert_facts(decoded, labels, student.bfloat16(), got)
    assert not got.cosine.requires_grad


def test_impossible_classes_have_no_entropy():
    teachers = torch.tensor([[[0.0, float("-inf"), 0.0, float("-inf")]]])
    got = teacher_stats(teachers, torch.tensor([1]))
    assert float(got.entropy) == pytest.approx(np.log(2), abs=1e-6)
    assert float(got.cross_entropy) == float("inf")
    assert not got.correct.any()


def test_nan_stays_in_its_row():
    teachers, labels, student = random_teachers(3, 2, 4, 9)
    clean = teacher_stats(teachers, labels, student_logits=student)
    teachers[1, 2, 3] = float("nan")
    got = teacher_stats(teachers, labels, student_logits=student)
    for name in ("entropy", "norm", "cross_entropy", "cosine"):
        values, good = getattr(got, name), getattr(clean, name)
        assert values[1, 2].isnan()
        assert torch.equal(values[0], good[0])
        assert torch.equal(values[1, [0, 1, 3]], good[1, [0, 1, 3]])
    assert not got.correct[1, 2]


def test_another_ignore_index():
    teachers, labels, _ = random_teachers(4, 2, 3, 6)
    labels[1] = 255
    assert_facts(teachers, labels, None, teacher_stats(teachers, labels, ignore_index=255), 255)


def test_what_is_refused():
    teachers = torch.zeros(2, 3, 5)
    with pytest.raises(ValueError, match=r"labels has shape \(2,\), expected \(3,\) \(N,\)"):
        teacher_stats(teachers, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"labels holds 5 in row 2, expected a class id in 0\.\.4"):
        teacher_stats(teachers, torch.tensor([0, 1, 5]))
    with pytest.raises(ValueError, match="labels holds -1 in row 0"):
        teacher_stats(teachers, torch.tensor([-1, 1, 0]))
    with pytest.raises(TypeError, match=r"labels has dtype torch\.int32, expected int64"):
        teacher_stats(teachers, torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"teachers\[0\] has shape \(3, 5\), expected \(3, 6\)"):
        teacher_stats(teachers, student_logits=torch.zeros(3, 6))
    with pytest.raises(ValueError, match="teachers is empty"):
        teacher_stats([])


@pytest.mark.parametrize("classes", [1, 2, 64, 65, 1000])
def test_every_kind_of_rows_says_what_its_decoded_logits_say(classes):
    teachers, labels, student = random_teachers(5, 5, 6, classes)
    kept = min(5, classes)
    made = [
        DenseRows(teachers[0].half()),
        teachers[1].bfloat16(),
        int8_rows((6, classes)),
        int4_rows((6, classes)),
        topk_rows(6, kept, classes),
        teachers[4],
        packed_rows(6, kept, classes),
    ]
    labels[2] = -100
    got = teacher_stats(made, labels, student_logits=student.half())
    decoded = [rows.decode() if isinstance(rows, Rows) else rows.float() for rows in made]
    assert_facts(decoded, labels, student.half(), got)


def test_nan_and_impossible_classes_are_as_in_torch():
    teachers, labels, student = random_teachers(6, 1, 4, 9)
    teachers[0, 1, 3] = float("nan")
    teachers[0, 2, 4] = float("-inf")
    got = teacher_stats(teachers, labels, student_logits=student)
    want = teacher_stats(teachers.double(), labels, student_logits=student)
    for field in dataclasses.fields(got):
        mine, theirs = getattr(got, field.name), getattr(want, field.name)
        if mine.dtype == torch.float32:
            torch.testing.assert_close(mine, theirs.float(), equal_nan=True, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(mine, theirs), field.name
