"""What the fused loss refuses, and the words it uses."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from coursepack.kernels import DenseRows, MixedLabels, soft_target_loss, soft_targets

STUDENT = torch.zeros(3, 5)
TEACHERS = torch.zeros(2, 3, 5)
LABELS = torch.tensor([0, 4, -100])
NAN = math.nan


def labels(*ids):
    return torch.tensor(ids)


def mixed(first=LABELS, second=LABELS, lam=(0.5, 0.5, 0.5)):
    return MixedLabels(first, second, torch.tensor(lam))


VALUE_ERRORS = [
    ({"student_logits": torch.zeros(5)}, "student_logits has shape (5,), expected (N, C)"),
    ({"student_logits": torch.zeros(3, 0)}, "student_logits has no classes"),
    ({"student_logits": torch.zeros(4, 5)}, "teachers[0] has shape (3, 5), expected (4, 5) (N, C)"),
    ({"teachers": torch.zeros(3, 5)}, "teachers has shape (3, 5), expected (K, N, C)"),
    ({"teachers": []}, "teachers is empty, expected at least one"),
    ({"teachers": torch.zeros(0, 3, 5)}, "teachers is empty, expected at least one"),
    ({"teachers": [STUDENT, torch.zeros(3, 6)]}, "teachers[1] has shape (3, 6), expected (3, 5) (N, C)"),
    (
        {"teachers": [DenseRows(torch.zeros(3, 5, 1))]},
        "teachers[0] has shape (3, 5, 1), expected (3, 5) (N, C)",
    ),
    ({"teachers": torch.zeros(2, 3, 5, device="meta")}, "teachers[0] is on meta, expected cpu"),
    ({"labels": labels(0, 1)}, "labels has shape (2,), expected (3,) (N,)"),
    (
        {"labels": labels(0, 5, 1)},
        "labels holds 5 in row 1, expected a class id in 0..4 or ignore_index (-100)",
    ),
    ({"labels": labels(0, 1, -1)}, "labels holds -1 in row 2, expected a class id in 0..4"),
    ({"labels": LABELS, "ignore_index": 255}, "in 0..4 or ignore_index (255)"),
    ({"labels": mixed(first=labels(7, 0, 0))}, "labels.first holds 7 in row 0"),
    ({"labels": mixed(second=labels(0, 0, 9))}, "labels.second holds 9 in row 2"),
    ({"labels": mixed(second=labels(0, 0))}, "labels.second has shape (2,), expected (3,) (N,)"),
    ({"labels": mixed(lam=(0.5, 0.5))}, "labels.lam has shape (2,), expected (3,) (N,)"),
    ({"labels": mixed(lam=(0.5, 1.5, 0.5))}, "labels.lam holds 1.5 in row 1, expected 0 to 1"),
    ({"labels": mixed(lam=(0.5, 0.5, NAN))}, "labels.lam holds nan in row 2, expected 0 to 1"),
    (
        {"labels": mixed(), "adjustment": "shift"},
        "adjustment needs one label per row: it is not defined for MixedLabels",
    ),
    ({"labels": mixed(), "adjustment": ["none", "smooth"]}, "not defined for MixedLabels"),
    ({"adjustment": "shift"}, "labels is None, but adjustment or hard_weight needs labels"),
    ({"hard_weight": 0.5}, "labels is None, but adjustment or hard_weight needs labels"),
    (
        {"labels": LABELS, "adjustment": "swap"},
        "adjustment is 'swap', expected one of 'none', 'shift', 'smooth'",
    ),
    ({"labels": LABELS, "adjustment": ["shift"]}, "adjustment has 1 entries, expected one per teacher (2)"),
    ({"smoothing": 1.5}, "smoothing is 1.5, expected 0 to 1"),
    ({"smoothing": NAN}, "smoothing is nan, expected 0 to 1"),
    ({"divergence": "l1"}, "divergence is 'l1', expected one of 'kl', 'reverse_kl', 'js', 'mse'"),
    (
        {"divergence": "mse", "adjustment": "smooth", "labels": LABELS},
        'adjustment "smooth" makes probabilities: it is not defined for divergence "mse"',
    ),
    ({"reduction": "batchmean"}, "reduction is 'batchmean', expected one of 'none', 'mean', 'sum'"),
    ({"combine": "product"}, "combine is 'product', expected one of 'mixture', 'sum'"),
    ({"soft_weight": NAN}, "soft_weight is nan, expected a finite number"),
    ({"hard_weight": math.inf, "labels": LABELS}, "hard_weight is inf, expected a finite number"),
    ({"temperature": 0.0}, "temperature is 0.0, expected 0 < T <= 100"),
    ({"temperature": -1.0}, "temperature is -1.0, expected 0 < T <= 100"),
    ({"temperature": 101}, "temperature is 101, expected 0 < T <= 100"),
    ({"temperature": NAN}, "temperature is nan, expected 0 < T <= 100"),
    ({"temperature": torch.tensor(0.0)}, "temperature holds 0 in row 0, expected 0 < T <= 100"),
    (
        {"temperature": torch.tensor([1.0, 101.0, 1.0])},
        "temperature holds 101 in row 1, expected 0 < T <= 100",
    ),
    ({"temperature": torch.tensor([1.0, 1.0, NAN])}, "temperature holds nan in row 2, expected 0 < T <= 100"),
    ({"temperature": torch.ones(2)}, "temperature has shape (2,), expected a number or (3,) (N,)"),
    (
        {"temperature": torch.ones(3).requires_grad_()},
        "temperature requires a gradient, but the loss gives it none: pass temperature.detach()",
    ),
    ({"teacher_temperature": [1.0]}, "teacher_temperature has 1 entries, expected one per teacher (2)"),
    ({"teacher_temperature": [1.0, 0.0]}, "teacher_temperature[1] is 0.0, expected 0 < T <= 100"),
    (
        {"teacher_temperature": torch.ones(3, 2)},
        "teacher_temperature has 3 entries, expected one per teacher (2)",
    ),
    (
        {"teacher_temperature": torch.ones(2, 4)},
        "teacher_temperature[0] has shape (4,), expected a number or (3,) (N,)",
    ),
    ({"teacher_temperature": torch.tensor([1.0, NAN])}, "teacher_temperature[1] holds nan in row 0"),
    ({"weights": torch.ones(3)}, "weights has shape (3,), expected (2,) (K,) or (3, 2) (N, K)"),
    ({"weights": torch.ones(2, 3)}, "weights has shape (2, 3), expected (2,) (K,) or (3, 2) (N, K)"),
    ({"weights": [1.0, 1.0, 1.0]}, "weights has 3 entries, expected one per teacher (2)"),
    ({"weights": torch.tensor([1.0, -0.5])}, "weights holds -0.5, expected no negative weight"),
    ({"weights": [1.0, NAN]}, "weights holds nan, expected no negative weight"),
    ({"row_weight": torch.ones(2)}, "row_weight has shape (2,), expected (3,) (N,)"),
    ({"row_weight": torch.tensor([1.0, NAN, 1.0])}, "row_weight holds nan in row 1, expected a number"),
    ({"row_weight": torch.ones(3).requires_grad_()}, "row_weight requires a gradient"),
]

TYPE_ERRORS = [
    ({"student_logits": torch.zeros(3, 5, dtype=torch.int64)}, "student_logits has dtype torch.int64"),
    ({"teachers": torch.zeros(2, 3, 5, dtype=torch.uint8)}, "teachers[0] has dtype torch.uint8"),
    ({"teachers": [STUDENT, STUDENT.int()]}, "teachers[1] has dtype torch.int32"),
    ({"labels": torch.zeros(3)}, "labels has dtype torch.float32, expected int64 class ids"),
    ({"labels": torch.zeros(3, dtype=torch.int32)}, "labels has dtype torch.int32, expected int64 class ids"),
    ({"labels": mixed(first=torch.zeros(3))}, "labels.first has dtype torch.float32"),
    ({"teacher_temperature": 4.0}, "teacher_temperature is 4.0, expected one number per teacher (2)"),
    ({"weights": torch.tensor([1, 1])}, "weights has dtype torch.int64, expected a floating-point dtype"),
]


def call(changes):
    arguments = {"student_logits": STUDENT, "teachers": TEACHERS, **changes}
    return soft_target_loss(**arguments)


@pytest.mark.parametrize(("changes", "text"), VALUE_ERRORS, ids=[text for _, text in VALUE_ERRORS])
def test_values_refused(changes, text):
    with pytest.raises(ValueError) as refusal:
        call(changes)
    assert text in str(refusal.value)


@pytest.mark.parametrize(("changes", "text"), TYPE_ERRORS, ids=[text for _, text in TYPE_ERRORS])
def test_dtypes_refused(changes, text):
    with pytest.raises(TypeError) as refusal:
        call(changes)
    assert text in str(refusal.value)


def test_limits_are_allowed():
    allowed = [
        {"temperature": 100},
        {"temperature": torch.tensor([1e-3, 1.0, 100.0])},
        {"smoothing": 1.0},
        {"labels": LABELS},
        {"labels": mixed(lam=(0.0, 1.0, 0.5)), "hard_weight": 1.0},
        {"labels": mixed(), "adjustment": ["none", "none"]},
        {"weights": [0.0, 0.0]},
        {"weights": torch.ones(3, 2)},
        {"row_weight": torch.tensor([0.0, -1.0, 2.0])},
    ]
    for changes in allowed:
        assert call(changes).isfinite().all(), changes


def test_soft_targets_refuse_the_same():
    refuse = partial(pytest.raises, ValueError)
    with refuse(match=r"teachers has shape \(3, 5\), expected \(K, N, C\)"):
        soft_targets(STUDENT)
    with refuse(match=r"labels holds 5 in row 0"):
        soft_targets(TEACHERS, labels(5, 0, 0))
    with refuse(match="labels is None, but adjustment"):
        soft_targets(TEACHERS, adjustment="smooth")
    with refuse(match="temperature is 0, expected"):
        soft_targets(TEACHERS, temperature=0)
    with refuse(match=r"weights has shape \(5,\)"):
        soft_targets(TEACHERS, weights=torch.ones(5))
