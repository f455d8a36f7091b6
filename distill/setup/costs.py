"""Bytes that a view of a teacher's outputs takes: the arrays that a method reads, and the same unreduced.

Computed from shapes alone. The files of a view hold checksums and the padding of their last chunk as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coursepack.data.encodings import parse_encoding
from coursepack.data.store import Manifest
from coursepack.data.store.manifest import FEATURES, LOGITS
from coursepack.distill.setup.requirements import logits_read, term_pairs
from coursepack.distill.setup.teacher import tap_shapes, untrained
from coursepack.errors import RecipeError
from coursepack.models.taps import tap_from_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coursepack.distill.objective_config import ObjectiveConfig
    from coursepack.models import Network

FLOAT16 = 2
"""Bytes per value of unreduced outputs, and of arrays that are not stored yet."""


@dataclass(frozen=True)
class ViewCost:
    """Bytes of one view of one teacher."""

    samples: int
    """Number of samples N."""
    arrays: dict[str, int]
    """Bytes per sample of the arrays that the method reads, by their name in the store."""
    whole: int | None
    """Bytes per sample of the same outputs in float16 and unreduced: logits of all classes, and whole maps of
    the tapped layers; None if the teacher cannot be built for its shapes."""

    @property
    def read(self) -> int:
        """Bytes per sample that the method reads."""
        return sum(self.arrays.values())


def view_costs(
    objective: ObjectiveConfig, teachers: Sequence[Manifest], student: Network | None = None
) -> list[ViewCost]:
    """Return what a view of each teacher costs with an objective.

    Arrays that a store holds count as they are encoded there, others as float16, or as bits for signs.

    Args:
        objective: the method's objective.
        teachers: manifest of each teacher's store, or a `planned_store`.
        student: the student, on which pairs of layers may depend; defaults to the first teacher's network.

    Raises:
        RecipeError: an array is not stored, and the teacher cannot be built here for its shapes.
    """
    taps = [list[str]() for _ in teachers]
    if objective.needs().pairs is not None:
        student = student or untrained(teachers[0])
        if student is None:
            raise _unknown(teachers[0], "its layers are")
        for index, tap, _ in (
            pair for of_term in term_pairs(objective, teachers, student).values() for pair in of_term
        ):
            taps[index] += [] if tap in taps[index] else [tap]
    read = logits_read(objective, teachers)
    return [
        _cost(teacher, own, index in read)
        for index, (teacher, own) in enumerate(zip(teachers, taps, strict=True))
    ]


def planned_store(spec: str, classes: int, samples: int) -> Manifest:
    """Return the manifest of a store that is not written yet, of a teacher's network by name."""
    names = tuple(map(str, range(classes)))
    return Manifest({"teacher": {"network": spec}}, {}, samples, names, 1, 1, arrays={}, tables={})


def _cost(teacher: Manifest, taps: Sequence[str], logits: bool) -> ViewCost:
    shapes = tap_shapes(teacher, taps)
    classes = len(teacher.class_names)
    arrays = {LOGITS: _row_bytes(teacher, LOGITS, "float16", (classes,))} if logits else {}
    for tap in taps:
        encoding = "bits" if tap_from_name(tap).reduction == "sign" else "float16"
        shape = None if shapes is None else shapes[tap]
        arrays[f"{FEATURES}{tap}"] = _row_bytes(teacher, f"{FEATURES}{tap}", encoding, shape)
    if shapes is None:
        return ViewCost(teacher.samples, arrays, None)
    layers = {layer for tap in taps for layer in tap_from_name(tap).layers}
    values = classes * logits + sum(math.prod(shapes[layer]) for layer in layers)
    return ViewCost(teacher.samples, arrays, FLOAT16 * values)


def _row_bytes(teacher: Manifest, array: str, encoding: str, shape: tuple[int, ...] | None) -> int:
    """Return the bytes per sample of an array, stored or to be stored."""
    if array in teacher.arrays:
        return teacher.arrays[array].row_bytes
    if shape is None:
        raise _unknown(teacher, f"the shape of {array!r} is")
    return sum(component.row_bytes for component in parse_encoding(encoding).components(shape).values())


def _unknown(teacher: Manifest, what: str) -> RecipeError:
    spec = teacher.identity["teacher"]["network"]
    return RecipeError(
        f"{what} not known, since the network of teacher {spec!r} cannot be built here: store the features "
        "first, and give --student"
    )
