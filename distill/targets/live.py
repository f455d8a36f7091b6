"""Targets computed by the stores' teachers while the student trains, without their stored outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from coursepack.distill.targets.base import FEATURES, targets_of
from coursepack.errors import NonFiniteOutput
from coursepack.models import TeacherRunner
from coursepack.models.build import reload_teacher
from coursepack.models.taps import tap_from_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from coursepack.data import Batch
    from coursepack.data.randomness import Samples
    from coursepack.data.store import StoreReader
    from coursepack.distill.targets.base import Targets
    from coursepack.kernels import Rows


class OnlineTargets:
    """Targets asked of teachers that run beside the student: the baseline, and the proof."""

    def __init__(self, runners: Sequence[TeacherRunner]) -> None:
        self.runners = list(runners)
        self._finite: dict[int, Tensor] = {}
        """Per index whether all answers so far were finite; on the device, so that no step waits for it."""

    def fetch(self, batch: Batch, teachers: Sequence[int] | None = None) -> Targets:
        """The teachers' answers to the batch's own views, rendered at each teacher's size."""
        indices = range(len(self.runners)) if teachers is None else teachers
        arrays: dict[tuple[int, str], Tensor | Rows] = {}
        for index in indices:
            runner = self.runners[index]
            output = runner.run(batch.pixels(runner.network.preprocessing.size))
            arrays |= {(index, name): value.clone() for name, value in output.arrays().items()}
            finite = torch.stack([torch.isfinite(value).all() for value in output.arrays().values()]).all()
            self._finite[index] = finite & self._finite.get(index, finite)
        return targets_of(arrays, indices)

    def open(self, view: int, teachers: Sequence[int] | None = None) -> None:
        """Nothing to do: live teachers answer when asked."""

    def prefetch(self, view: int) -> None:
        """Nothing to do: live teachers answer when asked."""

    def will_need(self, view: int, samples: Samples) -> None:
        """Nothing to do: live teachers answer when asked."""

    def check_unchanged(self) -> None:
        """Nothing to do: live teachers have no files."""

    def check_finite(self, views: Sequence[int]) -> None:
        """Refuse teachers whose weights or answers so far were not finite.

        Raises:
            NonFiniteOutput: names the teacher.
        """
        for index, runner in enumerate(self.runners):
            runner.check_weights()
            if not bool(self._finite.get(index, True)):
                raise NonFiniteOutput(
                    f"live teacher {runner.network.spec!r} gave answers that are not finite: check its "
                    "weights and its preprocessing, or leave it out"
                )


def live_teachers(
    readers: Sequence[StoreReader],
    arrays: Sequence[Sequence[str]],
    device: torch.device,
    *,
    trust_code: bool = False,
) -> list[TeacherRunner]:
    """The stores' teachers themselves, loaded from where their weights were when the stores were written.

    Raises:
        UntrustedCode: a store names Python code for its teacher, and `trust_code` is false.
        TeacherMismatch: the weights there are not the ones that wrote the store.
    """
    runners = []
    for reader, names in zip(readers, arrays, strict=True):
        manifest = reader.manifest
        teacher = manifest.identity["teacher"]
        network = reload_teacher(
            teacher,
            manifest.class_names,
            manifest.origin.get("weights_file"),
            holder=f"store {str(reader.path)!r}",
            trust_code=trust_code,
        )
        features = [name.removeprefix(FEATURES) for name in names if name.startswith(FEATURES)]
        taps = [tap_from_name(name) for name in features]
        runners.append(TeacherRunner(network, taps, device, teacher.get("columns")))
    return runners
