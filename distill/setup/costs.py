"""Bytes that a view of a teacher's outputs takes: the arrays that a method reads, and everything it might read.

Computed from shapes alone; a view's files also hold checksums and the padding of their last chunk, less than
one percent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from coursepack.data.encodings import parse_encoding
from coursepack.data.store import Manifest
from coursepack.data.store.manifest import LOGITS
from coursepack.distill.setup.requirements import term_pairs
from coursepack.distill.targets.base import FEATURES
from coursepack.errors import CoursepackError, RecipeError
from coursepack.models import build_network
from coursepack.models.taps import tap_from_name, tap_margins, tapped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coursepack.distill.objective_config import ObjectiveConfig
    from coursepack.models import Network

FLOAT16 = 2
"""Bytes per value of whole logits and maps, and of arrays that are not stored yet."""


@dataclass(frozen=True)
class ViewCost:
    """Bytes of one view of one teacher."""

    samples: int
    """Number of samples N."""
    reads: dict[str, int]
    """Bytes per sample of the arrays that the method reads, by their name in the store."""
    whole: int | None
    """Bytes per sample of the same outputs unreduced in float16: logits of all classes, and whole maps of the
    tapped layers; None if the teacher cannot be built for its shapes."""

    @property
    def read(self) -> int:
        """Bytes per sample that the method reads."""
        return sum(self.reads.values())


def view_costs(
    objective: ObjectiveConfig, teachers: Sequence[Manifest], student: Network | None = None
) -> list[ViewCost]:
    """Return what a view of each teacher costs with an objective.

    Arrays that a store holds count as they are encoded there, others as float16, or as bits for signs.

    Args:
        objective: the method's objective.
        teachers: manifest of each teacher's store, or `planned_store`.
        student: the student, which pairs of layers depend on; defaults to the first teacher's network.

    Raises:
        RecipeError: pairs depend on the student, and the first teacher's network cannot be built.
    """
    needs = objective.needs()
    pairs = {}
    if needs.pairs is not None:
        pairs = term_pairs(objective, teachers, student or _required(teachers[0]))
    chosen = [pair for of_term in pairs.values() for pair in of_term]
    return [
        _cost(teacher, list(dict.fromkeys(tap for number, tap, _ in chosen if number == index)), needs.logits)
        for index, teacher in enumerate(teachers)
    ]


def planned_store(spec: str, classes: int, samples: int) -> Manifest:
    """Return the manifest of a store that is not written, for a teacher's network by name."""
    identity = {"teacher": {"network": spec}}
    names = tuple(map(str, range(classes)))
    return Manifest(identity, {}, samples, names, views=1, block_rows=1, arrays={}, tables={})


def _cost(teacher: Manifest, taps: list[str], logits: bool) -> ViewCost:
    classes = len(teacher.class_names)
    reads = {LOGITS: _stored(teacher, LOGITS) or FLOAT16 * classes} if logits else {}
    whole: int | None = FLOAT16 * classes if logits else 0
    shapes = _tap_shapes(teacher, taps)
    for tap in taps:
        array = f"{FEATURES}{tap}"
        size = _stored(teacher, array)
        if size is None and shapes is not None:
            encoding = parse_encoding("bits" if tap_from_name(tap).reduction == "sign" else "float16")
            size = sum(part.row_bytes for part in encoding.components(shapes[tap]).values())
        if size is None:
            raise RecipeError(
                f"the size of {array!r} is not known: it is not stored, and teacher "
                f"{teacher.identity['teacher']['network']!r} cannot be built here"
            )
        reads[array] = size
    if taps and shapes is None:
        whole = None
    elif whole is not None and shapes is not None:
        layers = dict.fromkeys(layer for tap in taps for layer in tap_from_name(tap).layers)
        whole += FLOAT16 * sum(math.prod(shapes[layer]) for layer in layers)
    return ViewCost(teacher.samples, reads, whole)


def _stored(teacher: Manifest, array: str) -> int | None:
    """Return the bytes per sample of an array, or None if it is not stored."""
    return teacher.arrays[array].row_bytes if array in teacher.arrays else None


def _network(teacher: Manifest) -> Network | None:
    """Return a teacher's network, untrained; None for user code, which stores must not run."""
    identity = teacher.identity["teacher"]
    if identity["network"].startswith("python:"):
        return None
    size = identity.get("preprocessing", {}).get("size")
    try:
        return build_network(identity["network"], len(teacher.class_names), size=size)
    except CoursepackError:
        return None


def _required(teacher: Manifest) -> Network:
    network = _network(teacher)
    if network is None:
        raise RecipeError(
            "this method compares layers of teacher and student, and teacher "
            f"{teacher.identity['teacher']['network']!r} cannot be built here to stand for the student: give --student"
        )
    return network


@torch.inference_mode()
def _tap_shapes(teacher: Manifest, taps: Sequence[str]) -> dict[str, tuple[int, ...]] | None:
    """Return the shape of one sample's features by tap and by layer; None if the teacher cannot be built.

    Raises:
        UnknownName: a tap's layer does not exist.
    """
    network = _network(teacher) if taps else None
    if network is None:
        return None
    module, pixels = network.module.eval(), network.preprocessing
    images = torch.zeros(1, pixels.size, pixels.size, len(pixels.mean), dtype=torch.uint8)
    parsed = {tap: tap_from_name(tap) for tap in taps}
    layers = list(dict.fromkeys(layer for tap in parsed.values() for layer in tap.layers))
    with tapped(module, layers) as outputs:
        module(pixels(images))
        shapes = {layer: tuple(outputs[layer].shape[1:]) for layer in layers}
        for name, tap in parsed.items():
            reduced = tap.reduce([outputs[layer] for layer in tap.layers], tap_margins(module, tap))
            shapes[name] = tuple(reduced.shape[1:])
    return shapes
