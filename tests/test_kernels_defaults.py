"""torch's default dtype and default device, which a training script may set, change nothing on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coursepack.data.encodings import parse_encoding
from coursepack.kernels import normalize, soft_target_loss, soft_targets, teacher_stats
from coursepack.kernels.angles import angle_loss, chunked_angle_loss
from coursepack.kernels.regression import linear_squared_error, squared_error

ROWS, CLASSES, WIDTH = 40, 100, 16
GENERATOR = torch.Generator().manual_seed(0)
STUDENT = torch.randn(ROWS, CLASSES, generator=GENERATOR) * 3
TEACHERS = torch.randn(2, ROWS, CLASSES, generator=GENERATOR) * 3
LABELS = torch.randint(CLASSES, (ROWS,), generator=GENERATOR)
POINTS, OTHER_POINTS = torch.randn(2, ROWS, WIDTH, generator=GENERATOR)
WEIGHT, BIAS = torch.randn(WIDTH, WIDTH, generator=GENERATOR), torch.randn(WIDTH, generator=GENERATOR)
PIXELS = torch.randint(256, (3, 4, 5, 3), dtype=torch.uint8, generator=GENERATOR)
TABLE = torch.randn(3, 256, generator=GENERATOR)


def encoded_rows(name):
    encoding, values = parse_encoding(name), TEACHERS[0].numpy()
    parts = encoding.encode(values, np.arange(ROWS), LABELS.numpy())
    return encoding.rows({key: torch.from_numpy(part) for key, part in parts.items()}, (CLASSES,))


ENCODED = {name: encoded_rows(name) for name in ("float16", "int8", "int4", "topk:10", "topk16:10")}


def loss_and_gradients(divergence, reduction, weighted=False):
    z = STUDENT.clone().requires_grad_(True)
    weights = torch.full_like(STUDENT[:, :2], 0.5).requires_grad_(weighted)
    options = {"temperature": 4.0, "hard_weight": 0.5, "divergence": divergence, "reduction": reduction}
    loss = soft_target_loss(z, TEACHERS, LABELS, weights=weights, **options)
    loss.sum().backward()
    return loss.detach(), z.grad, *((weights.grad,) if weighted else ())


def tensors(result):
    return result if isinstance(result, tuple) else (result,)


FUNCTIONS = {
    **{f"{name}-{how}": (lambda n=name, h=how: loss_and_gradients(n, h))
       for name in ("kl", "reverse_kl", "js", "mse") for how in ("none", "mean")},
    "weights": lambda: loss_and_gradients("kl", "mean", weighted=True),
    "float64": lambda: soft_target_loss(STUDENT.double(), TEACHERS, LABELS, temperature=4.0),
    "soft_targets": lambda: soft_targets(TEACHERS, temperature=4.0),
    "teacher_stats": lambda: teacher_stats(TEACHERS, LABELS, student_logits=STUDENT).entropy,
    "squared_error": lambda: squared_error(POINTS, OTHER_POINTS.half()),
    "linear_squared_error": lambda: linear_squared_error(POINTS, WEIGHT, BIAS, OTHER_POINTS.half()),
    "angle_loss": lambda: angle_loss(POINTS, OTHER_POINTS),
    "chunked_angle_loss": lambda: chunked_angle_loss(POINTS, OTHER_POINTS),
    "normalize": lambda: normalize(PIXELS, [0, 1, 2], TABLE),
    **{f"loss of {name}": (lambda rows=rows: soft_target_loss(STUDENT, [rows], temperature=4.0))
       for name, rows in ENCODED.items()},
    **{f"decode {name}": rows.decode for name, rows in ENCODED.items()},
}  # fmt: skip


DEFAULTS = {
    "dtype": (torch.set_default_dtype, torch.float64, torch.float32),
    "device": (torch.set_default_device, "meta", None),
}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_depends_on_a_default(name, default):
    want = FUNCTIONS[name]()
    change, other, usual = DEFAULTS[default]
    change(other)
    try:
        got = FUNCTIONS[name]()
    finally:
        change(usual)
    assert len(tensors(got)) == len(tensors(want))
    assert all(map(torch.equal, tensors(want), tensors(got)))
