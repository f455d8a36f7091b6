"""Training metrics of an epoch, accumulated on the device so that steps do not synchronize with it.

Loss, terms, accuracy, teachers' weights and temperatures are computed for every batch. Metrics that would
slow a step down (NLL, top-5 accuracy, calibration, agreement with the teachers, number of shifted samples)
are computed for one batch in `WATCH_EVERY`, starting with the first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from coursepack.distill.distributed import SINGLE_RANK
from coursepack.kernels import soft_target_loss, soft_targets, teacher_stats
from coursepack.models.calibration import Calibration

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from coursepack.data import Batch
    from coursepack.distill.distributed import Ranks
    from coursepack.distill.objective import ObjectiveValue
    from coursepack.distill.training.learner import LearnerOutput

WATCH_EVERY = 8
"""Interval, in batches, at which the more expensive metrics are computed."""


def top5_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the number of samples whose label is among the five largest logits, as a scalar tensor."""
    return (logits.topk(5, dim=1).indices == labels[:, None]).any(1).sum()


class EpochMetrics:
    """Metrics of one student over one epoch and all ranks."""

    def __init__(self, teachers: int = 1, ranks: Ranks = SINGLE_RANK) -> None:
        """Initialize empty metrics for a number of teachers."""
        self._teacher_count = teachers
        self._ranks = ranks
        self._batches = self._samples = self._watched = 0
        self._sums: dict[str, Tensor] = {}
        self._calibration: Calibration | None = None
        self._extremes: tuple[Tensor, Tensor] | None = None

    def add(self, output: LearnerOutput, batch: Batch) -> None:
        """Add one batch. Each rank adds its share; a batch that every rank computed whole counts once."""
        if batch.global_batch is None and not self._ranks.is_first:
            return
        count, labels = len(batch), batch.main_labels
        logits = output.student_logits.detach().float()
        if self._calibration is None:
            self._calibration = Calibration(logits.device)
        watched = self._batches % WATCH_EVERY == 0
        self._sum("loss", output.value.loss.detach() * count)
        for name, term in output.value.terms.items():
            self._sum(name, term * count)
        self._sum("accuracy", (logits.argmax(1) == labels).sum())
        if watched:
            self._watched += count
            self._calibration.add(logits, labels)
            self._sum("watched.nll", F.cross_entropy(logits, labels, reduction="sum"))
            if logits.shape[1] > 5:
                self._sum("watched.accuracy_top5", top5_correct(logits, labels))
        self._add_temperatures(output.value)
        if output.value.targets is not None and output.value.targets.logits:
            self._add_weights(output.value, labels, logits.shape[1])
            if watched:
                self._watch(output.value, logits, batch)
        self._samples += count
        self._batches += 1

    def state(self) -> list[dict[str, Any]]:
        """Return the sums of every rank, on the CPU. All ranks must call it."""
        own = {
            "counts": (self._batches, self._samples, self._watched),
            "sums": {name: value.cpu() for name, value in self._sums.items()},
            "calibration": None if self._calibration is None else self._calibration.sums.cpu(),
            "extremes": None if self._extremes is None else tuple(value.cpu() for value in self._extremes),
        }
        return self._ranks.all_gather(own)

    def restore(self, states: list[dict[str, Any]]) -> None:
        """Restore a result of `state`; with another number of ranks, the first rank takes over all sums."""
        if len(states) == self._ranks.count:
            self._continue(states[self._ranks.index])
        elif self._ranks.is_first:
            self._continue(_merged(states))

    def _continue(self, state: dict[str, Any]) -> None:
        self._batches, self._samples, self._watched = state["counts"]
        self._sums, self._extremes = dict(state["sums"]), state["extremes"]
        if state["calibration"] is not None:
            self._calibration = Calibration(state["calibration"].device)
            self._calibration.sums = state["calibration"]

    def means(self) -> dict[str, Any]:
        """Return the means as plain numbers, with groups `teachers` and `temperature` where they apply.

        All ranks must call it.
        """
        everything = EpochMetrics(self._teacher_count)
        everything._continue(_merged(self.state()))
        return everything._means()

    def _means(self) -> dict[str, Any]:
        assert self._calibration is not None
        groups = ("teachers.", "temperature.", "watched.")
        means: dict[str, Any] = {
            name: float(value) / self._samples
            for name, value in self._sums.items()
            if not name.startswith(groups)
        }
        for name in ("nll", "accuracy_top5"):
            if f"watched.{name}" in self._sums:
                means[name] = float(self._sums[f"watched.{name}"]) / self._watched
        means["calibration_error"] = self._calibration.error()
        if "teachers.by_class" in self._sums:
            means["teachers"] = self._teachers()
        if self._extremes is not None:
            lowest, highest = self._extremes
            means["temperature"] = {
                "mean": float(self._sums["temperature.sum"]) / self._samples,
                "min": float(lowest),
                "max": float(highest),
                "clamped": float(self._sums["temperature.clamped"]) / self._samples,
            }
        return means

    def _sum(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _add_temperatures(self, value: ObjectiveValue) -> None:
        if value.temperatures is None:
            return
        temperatures = value.temperatures.values
        low, high = temperatures.min(), temperatures.max()
        if self._extremes is not None:
            low, high = torch.minimum(low, self._extremes[0]), torch.maximum(high, self._extremes[1])
        self._extremes = (low, high)
        self._sum("temperature.sum", temperatures.sum())
        self._sum("temperature.clamped", value.temperatures.clamped.sum())

    def _add_weights(self, value: ObjectiveValue, labels: Tensor, classes: int) -> None:
        """Add the weights per class and teacher, `(C, K)`; teachers that are not read have weight zero."""
        assert value.targets is not None
        indices, rows = value.targets.indices, len(labels)
        weights = torch.full((rows, len(indices)), 1 / len(indices), device=labels.device)
        if value.weights is not None:
            weights = value.weights.float().expand(rows, len(indices))
        by_class = torch.zeros(classes, len(indices), device=labels.device).index_add_(0, labels, weights)
        self._sum("teachers.by_class", self._all_teachers(by_class, indices))
        per_class = torch.zeros(classes, dtype=torch.int64, device=labels.device)
        self._sum("teachers.per_class", per_class.index_add_(0, labels, torch.ones_like(labels)))

    def _all_teachers(self, values: Tensor, indices: Sequence[int]) -> Tensor:
        """Return values `(..., K)` of all teachers, from those that were read and zeros for the others."""
        full = values.new_zeros(*values.shape[:-1], self._teacher_count)
        for column, index in enumerate(indices):
            full[..., index] = values[..., column]
        return full

    def _watch(self, value: ObjectiveValue, logits: Tensor, batch: Batch) -> None:
        """Add the comparison of student and teachers at T = 1, without adjustments."""
        targets = value.targets
        assert targets is not None
        weights = None if value.weights is None else _to_one(value.weights)
        compared = targets.logits if value.unified is None else [value.unified] * len(targets.indices)
        mixture = soft_targets(compared, weights=weights)
        has_target = mixture.amax(1) > 0
        self._sum("watched.agreement", ((mixture.argmax(1) == logits.argmax(1)) & has_target).sum())
        self._sum("watched.kl", soft_target_loss(logits, compared, weights=weights, reduction="sum"))
        correct = teacher_stats(compared, batch.main_labels).correct
        assert correct is not None
        wrong = (~correct).sum(1).float()
        shifted = torch.zeros_like(wrong)
        for column, name in enumerate(value.adjustments):
            shifted[column] = wrong[column] * (name != "none")
        self._sum("watched.wrong", self._all_teachers(wrong, targets.indices))
        self._sum("watched.shifted", self._all_teachers(shifted, targets.indices))
        self._sum("watched.seen", self._all_teachers(torch.full_like(wrong, len(batch)), targets.indices))

    def _teachers(self) -> dict[str, Any]:
        by_class, per_class = self._sums["teachers.by_class"], self._sums["teachers.per_class"]
        values: dict[str, Any] = {
            "weight": (by_class.sum(0) / self._samples).tolist(),
            "weight_by_class": (by_class / per_class.clamp_min(1)[:, None]).T.tolist(),
        }
        seen = self._sums["watched.seen"].clamp_min(1)
        for name in ("wrong", "shifted"):
            values[name] = (self._sums[f"watched.{name}"] / seen).tolist()
        for name in ("agreement", "kl"):
            values[name] = float(self._sums[f"watched.{name}"]) / self._watched
        return values


def _merged(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge the sums of several ranks into those of one."""
    batches, samples, watched = zip(*(state["counts"] for state in states), strict=True)
    names = dict.fromkeys(name for state in states for name in state["sums"])
    extremes = [state["extremes"] for state in states if state["extremes"] is not None]
    return {
        "counts": (max(batches), sum(samples), sum(watched)),
        "sums": {
            name: _sum_of([state["sums"][name] for state in states if name in state["sums"]])
            for name in names
        },
        "calibration": _sum_of([s["calibration"] for s in states if s["calibration"] is not None]),
        "extremes": (min(low for low, _ in extremes), max(high for _, high in extremes))
        if extremes
        else None,
    }


def _sum_of(values: Sequence[Tensor]) -> Tensor | None:
    return torch.stack(list(values)).sum(0) if values else None


def _to_one(weights: Tensor) -> Tensor:
    """Return weights normalized to sum to one, so that equal distributions have divergence zero."""
    return weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)
