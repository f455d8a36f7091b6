"""Pairs of taps and student layers that a term can compare, as far as their shapes are known."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from coursepack.data.store.manifest import FEATURES
from coursepack.distill.losses.base import FeaturePair, Unfit
from coursepack.distill.setup.student import UNFIT, probe_student
from coursepack.distill.setup.teacher import tap_shapes
from coursepack.errors import CoursepackError
from coursepack.models.taps import tap_from_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coursepack.data.store import Manifest
    from coursepack.distill.losses.base import PairNeeds
    from coursepack.distill.setup.teacher import Shapes
    from coursepack.models import Network


def problem_of(pair: FeaturePair, needs: PairNeeds) -> Unfit | None:
    """Return why a term cannot compare a pair, or None if it can."""
    tap = tap_from_name(pair.tap)
    if tap.sketch is not None and tap.reduction not in needs.sketches:
        return Unfit(f"it takes no sketch of {tap.reduction!r}", replace(tap, sketch=None).text)
    return None if needs.unfit is None else needs.unfit(pair)


class Fitting:
    """A teacher's taps and a student's layers, as far as their shapes are known."""

    def __init__(
        self,
        needs: PairNeeds,
        manifest: Manifest,
        taps: Sequence[str],
        student: Network,
        layers: Sequence[str],
    ) -> None:
        """Initialize the comparison.

        Args:
            needs: what the term can compare.
            manifest: the teacher's store.
            taps: names of the teacher's taps.
            student: the student.
            layers: layers of the student, or two joined by `+`.
        """
        self.needs, self.manifest = needs, manifest
        self.whole = {tap: replace(tap_from_name(tap), sketch=None).name for tap in taps}
        self.student, self.layers = student, sorted({name for layer in layers for name in layer.split("+")})

    def fits(self, tap: str, layer: str) -> bool:
        """Return true if the term can compare a tap with a student layer, or if a shape is not known."""
        if self.needs.unfit is None:
            return True
        name, layers = self.whole[tap], layer.split("+")
        array = self.manifest.arrays.get(f"{FEATURES}{name}")
        shape = self._teacher_shapes.get(name) if array is None else tuple(array.row_shape)
        if shape is None or not set(layers) <= self._student_shapes.keys():
            return True
        sides = (self._student_shapes[layer] for layer in layers)
        return problem_of(FeaturePair(0, tap, layer, shape, *sides), self.needs) is None

    def same_size(self, tap: str, layer: str) -> bool:
        """Return true if the maps of a tap's layers are known to be as large as those of the student's."""
        parsed = tap_from_name(tap)
        sizes = [self._teacher_shapes.get(name, ())[1:] for name in parsed.layers]
        if parsed.size is not None:
            sizes = [(parsed.size, parsed.size)] * len(sizes)
        return all(sizes) and sizes == [self._student_shapes.get(name, ())[1:] for name in layer.split("+")]

    @cached_property
    def _student_shapes(self) -> Shapes:
        try:
            return probe_student(self.student, self.student.preprocessing.channels, self.layers).features
        except CoursepackError:
            return {}

    @cached_property
    def _teacher_shapes(self) -> Shapes:
        """Shapes of taps, of sketches those before the projection, and of their layers' whole outputs."""
        try:
            return tap_shapes(self.manifest, list(self.whole.values())) or {}
        except (CoursepackError, ValueError, *UNFIT):
            return {}
