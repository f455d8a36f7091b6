"""Fused loss over stored teacher logits, encoded rows, and pixel normalization."""

from coursepack.kernels.dispatch import Choice as Choice
from coursepack.kernels.int4 import Int4Rows as Int4Rows
from coursepack.kernels.labels import MixedLabels as MixedLabels
from coursepack.kernels.loss import describe as describe
from coursepack.kernels.loss import soft_target_loss as soft_target_loss
from coursepack.kernels.loss import soft_targets as soft_targets
from coursepack.kernels.packed import PackedTopKRows as PackedTopKRows
from coursepack.kernels.pixels.normalize import normalize as normalize
from coursepack.kernels.reference import shift_logits as shift_logits
from coursepack.kernels.rows import BitRows as BitRows
from coursepack.kernels.rows import DenseRows as DenseRows
from coursepack.kernels.rows import Int8Rows as Int8Rows
from coursepack.kernels.rows import Rows as Rows
from coursepack.kernels.rows import TopKRows as TopKRows
from coursepack.kernels.rows import decode as decode
from coursepack.kernels.stats import TeacherStats as TeacherStats
from coursepack.kernels.stats import teacher_stats as teacher_stats

__all__ = [
    "BitRows",
    "Choice",
    "DenseRows",
    "Int4Rows",
    "Int8Rows",
    "MixedLabels",
    "PackedTopKRows",
    "Rows",
    "TeacherStats",
    "TopKRows",
    "decode",
    "describe",
    "normalize",
    "shift_logits",
    "soft_target_loss",
    "soft_targets",
    "teacher_stats",
]
