"""Targets computed by the stores' teachers while the student trains, without their stored outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from coursepack.data.store.manifest import FEATURES
from coursepack.distill.targets.base import targets_of
from coursepack.errors import NonFiniteOutput, RecipeError
from coursepack.models import TeacherRunner
from coursepack.models.load import reload_teacher
from coursepack.models.precision import has_precision
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
    """Targets computed by teachers that run live: the baseline that stores are compared with."""

    def __init__(self, runners: Sequence[TeacherRunner]) -> None:
        self.runners = list(runners)
        self._finite: dict[int, Tensor] = {}
        """Flag per teacher that all outputs so far were finite; on the device, to avoid a synchronization."""

    def fetch(self, batch: Batch, teachers: Sequence[int] | None = None) -> Targets:
        """Return the teachers' outputs for the batch's views, rendered at each teacher's image size."""
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
        """Do nothing: live teachers have no files."""

    def prefetch(self, view: int, teachers: Sequence[int] | None = None) -> None:
        """Do nothing: live teachers have no files."""

    def will_need(self, view: int, samples: Samples, teachers: Sequence[int] | None = None) -> None:
        """Do nothing: live teachers have no files."""

    def check_unchanged(self) -> None:
        """Do nothing: live teachers have no files."""

    def check_finite(self, views: Sequence[int]) -> None:
        """Check that the teachers' weights and all outputs so far are finite.

        Raises:
            NonFiniteOutput: they are not; the message names the teacher.
        """
        for index, runner in enumerate(self.runners):
            runner.check_weights()
            if not bool(self._finite.get(index, True)):
                raise NonFiniteOutput(
                    f"outputs of live teacher {runner.network.spec!r} are not finite: check its weights and "
                    "its preprocessing, or train without it"
                )


def live_teachers(
    readers: Sequence[StoreReader],
    arrays: Sequence[Sequence[str]],
    device: torch.device,
    *,
    trust_code: bool = False,
) -> list[TeacherRunner]:
    """Load the teachers of some stores from the weights files that the stores were written with.

    They run in the precision, in the memory layout and with or without `torch.compile` as for the store.

    Raises:
        UntrustedCode: a store names Python code for its teacher, and `trust_code` is false.
        TeacherMismatch: a weights file has changed since its store was written.
        RecipeError: the device does not have the precision that a store was written in.
    """
    runners = []
    for reader, names in zip(readers, arrays, strict=True):
        manifest = reader.manifest
        teacher = manifest.identity["teacher"]
        network = reload_teacher(
            teacher,
            manifest.class_names,
            manifest.origin.get("weights_file"),
            holder=f"store {reader.address!r}",
            trust_code=trust_code,
        )
        features = [name.removeprefix(FEATURES) for name in names if name.startswith(FEATURES)]
        taps = [tap_from_name(name) for name in features]
        # As the rows of the store, which all have the same settings unless `precompute run` warned.
        settings = manifest.environments[0] if manifest.environments else {}
        runners.append(
            TeacherRunner(
                network,
                taps,
                device,
                teacher.get("columns"),
                precision=_precision(reader, device),
                channels_last=settings.get("memory_layout") == "channels_last",
                compiled=settings.get("compile") is True,
            )
        )
    return runners


def _precision(reader: StoreReader, device: torch.device) -> str:
    precision: str = reader.manifest.identity.get("precision", "float32")
    if not has_precision(precision, device):
        raise RecipeError(
            f"store {reader.address!r} was written in {precision}, which device {str(device)!r} does not "
            "have, so its teacher cannot run live there: leave --online out, or use another --device"
        )
    return precision
