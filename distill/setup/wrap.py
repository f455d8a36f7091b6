"""Students that a term of their objective wraps, with a teacher's head from its store."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from coursepack.data.encodings import drops_classes
from coursepack.data.store import StoreReader
from coursepack.data.store.manifest import FEATURES, LOGITS, STATIC
from coursepack.distill.losses import LOSSES
from coursepack.distill.losses.base import WrapContext
from coursepack.distill.recipe import resolve_objective
from coursepack.distill.setup.requirements import check_needs, needed_arrays, term_pairs
from coursepack.distill.setup.student import blocks, probe_student
from coursepack.errors import RecipeError
from coursepack.imports import PROJECTED
from coursepack.kernels import decode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from torch import Tensor

    from coursepack.data import Source
    from coursepack.distill.objective_config import ObjectiveConfig
    from coursepack.distill.targets.teacher_stores import TeacherStores
    from coursepack.models import Network

CHECKED_SAMPLES = 32
LARGEST_ERROR = 0.05
"""Largest error of the logits that the head gives for stored maps, as a share of the logits' deviation.
Encodings cause less; an activation between map and head causes more."""


def wrap_student(
    stores: TeacherStores,
    student: Network,
    method: str,
    changes: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
) -> Network:
    """Return the network that a method trains: the student, wrapped if a term of the method wraps it.

    Arguments as of `make_objective`, which expects the result. The student's module becomes a part of it.

    Raises:
        UnknownName: the method, or a layer of the student, does not exist.
        RecipeError: a value does not fit the stores, or as `wrapped_student`.
    """
    classes = len(stores.source.class_names)
    config = resolve_objective(method, changes or {}, f"method {method!r}", classes=classes)
    check_needs(method, config, stores.readers, stores.view, stores.root)
    return wrapped_student(
        config, student, stores.source, stores.readers, method=method, root=stores.root, seed=seed
    )


def check_wrapped(config: ObjectiveConfig, student: Network, method: str) -> None:
    """Check that a student is wrapped if a term of its objective wraps students.

    Raises:
        RecipeError: it is not.
    """
    wraps = any(LOSSES[term.term].wrap is not None for term in config.all_terms().values())
    if wraps and not student.spec.startswith(f"{PROJECTED}:"):
        raise RecipeError(
            f"method {method!r} trains a wrapped student: pass the result of wrap_student(stores, student, "
            f"{method!r}) in the place of {student.spec!r}"
        )


def wrapped_student(
    config: ObjectiveConfig,
    student: Network,
    source: Source,
    readers: Sequence[StoreReader],
    *,
    method: str,
    root: str | None,
    seed: int,
) -> Network:
    """Return the network that an objective trains: the student, wrapped if a term wraps it.

    The config must have passed `check_needs`. The student's module becomes a part of the result.

    Raises:
        UnknownName: a layer does not exist in the student.
        RecipeError: the features are not stored, the student cannot be wrapped, or the teacher's head does
            not read the mean of the stored map.
    """
    wrapping = {key: term for key, term in config.all_terms().items() if LOSSES[term.term].wrap is not None}
    if not wrapping:
        return student
    if student.spec.startswith(f"{PROJECTED}:"):
        raise RecipeError(
            f"student {student.spec!r} is already wrapped, but method {method!r} wraps it: name "
            "the network in it"
        )
    if len(wrapping) > 1:
        raise RecipeError(
            f"terms {' and '.join(map(repr, wrapping))} both wrap the student: keep one of them"
        )
    ((key, term),) = wrapping.items()
    (reader,) = readers
    pairs = {key: term_pairs(config, [reader.manifest], student)[key]}
    needed_arrays(method, readers, pairs, logits=(), root=root)
    tap = pairs[key][0][1]
    weight, bias = teacher_head(reader)
    context = WrapContext(
        blocks=tuple(blocks(student.module)),
        shape_of=lambda layer: probe_student(student, source.channels, [layer]).features[layer],
        tap=tap,
        teacher_shape=tuple(reader.manifest.arrays[f"{FEATURES}{tap}"].row_shape),
        head_weight=weight,
        head_bias=bias,
        seed=seed,
    )
    wrap = LOSSES[term.term].wrap
    assert wrap is not None
    wrapped = wrap(term, student, context)
    _check_head(reader, tap, weight, bias)
    return wrapped


def teacher_head(reader: StoreReader) -> tuple[Tensor, Tensor]:
    """Return weight `(C, D)` and bias `(C,)` of a teacher's head; the bias is zero if the teacher has none.

    Raises:
        RecipeError: they have other shapes.
    """
    classes = len(reader.manifest.class_names)
    weight = torch.from_numpy(reader.static("head_weight"))
    bias = weight.new_zeros(classes)
    if f"{STATIC}/head_bias" in reader.manifest.tables:
        bias = torch.from_numpy(reader.static("head_bias"))
    if weight.ndim != 2 or len(weight) != classes or bias.shape != (classes,):
        raise RecipeError(
            f"the head in store {reader.address!r} has weight {tuple(weight.shape)} and bias "
            f"{tuple(bias.shape)}, expected ({classes}, D) and ({classes},): write the store again"
        )
    return weight, bias


def _check_head(reader: StoreReader, tap: str, weight: Tensor, bias: Tensor) -> None:
    """Check on a few rows that the head gives the stored logits for the mean of the stored map."""
    manifest = reader.manifest
    if drops_classes(manifest.arrays[LOGITS].encoding):
        return
    rows = StoreReader(reader.location, "windowed")
    view = manifest.committed_views([LOGITS, f"{FEATURES}{tap}"])[0]
    samples = np.arange(min(CHECKED_SAMPLES, manifest.samples))
    logits, maps = (decode(rows.rows(name, view, samples)).float() for name in (LOGITS, f"{FEATURES}{tap}"))
    error = maps.mean((2, 3)) @ weight.T + bias - logits
    share = float(error.square().mean().sqrt() / (logits - logits.mean()).square().mean().sqrt())
    if not share <= LARGEST_ERROR:
        raise RecipeError(
            f"the head of the teacher in store {reader.address!r} does not read the mean of tap {tap!r}: "
            f"the logits that it gives for it differ from the stored ones by {share:.0%} of their deviation, "
            f"expected at most {LARGEST_ERROR:.0%}. Name the map that the teacher averages, after its last "
            "activation, or use a teacher that averages its last map"
        )
