"""What a run tells about an epoch: sums kept on the device, so that no step waits for it.

Loss, terms, accuracy, teachers' weights and temperatures are taken from every batch. What would make a step
longer (NLL, top-5, calibration, agreement with the teachers, how many samples are shifted) is taken from one
batch in `WATCH_EVERY`, the first among them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from coursepack.distill.distributed import ALONE
from coursepack.kernels import soft_target_loss, soft_targets, teacher_stats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from coursepack.data import Batch
    from coursepack.distill.distributed import Ranks
    from coursepack.distill.objective import ObjectiveValue
    from coursepack.distill.training.learner import LearnerOutput

WATCH_EVERY = 8
"""One batch in so many, the first among them, is compared with its teachers in full."""
BINS = 15
"""Of equal width, for the calibration error (Guo et al. 2017, arXiv 1706.04599, equation 3)."""


class Calibration:
    """Expected calibration error over many batches."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(BINS, 3, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count one batch: logits `(N, C)`, labels `(N,)`."""
        confidence, top = logits.detach().float().softmax(1).max(1)
        place = (confidence * BINS).long().clamp(0, BINS - 1)
        counts = torch.stack([torch.ones_like(confidence), confidence, (top == labels).float()], dim=1)
        self.sums.index_add_(0, place, counts.double())

    def error(self) -> float:
        """Mean over samples of |confidence - accuracy| of their bin."""
        count, confidence, correct = self.sums.T
        return float((confidence - correct).abs().sum() / count.sum().clamp_min(1))


def top5_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Samples whose label is among the five largest logits, a scalar."""
    return (logits.topk(5, dim=1).indices == labels[:, None]).any(1).sum()


class EpochMetrics:
    """Means over one epoch of one learner: of what every rank counted."""

    def __init__(self, teachers: int = 1, ranks: Ranks = ALONE) -> None:
        """Begin with nothing; `teachers` is how many stores there are."""
        self._teacher_count = teachers
        self._ranks = ranks
        self._batches = self._samples = self._watched = 0
        self._sums: dict[str, Tensor] = {}
        self._calibration: Calibration | None = None
        self._extremes: tuple[Tensor, Tensor] | None = None

    def add(self, output: LearnerOutput, batch: Batch) -> None:
        """Count one batch: each rank its own share, but the first alone what all ranks computed whole."""
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
        """Everything that each rank has counted so far, on the CPU; all ranks have to ask for it."""
        own = {
            "counts": (self._batches, self._samples, self._watched),
            "sums": {name: value.cpu() for name, value in self._sums.items()},
            "calibration": None if self._calibration is None else self._calibration.sums.cpu(),
            "extremes": None if self._extremes is None else tuple(value.cpu() for value in self._extremes),
        }
        return self._ranks.gathered(own)

    def restore(self, states: list[dict[str, Any]]) -> None:
        """Continue from what `state` gave; where ranks were more or fewer, the first has counted it all."""
        if len(states) == self._ranks.count:
            self._continue(states[self._ranks.index])
        elif self._ranks.is_first:
            self._continue(_added(states))

    def _continue(self, state: dict[str, Any]) -> None:
        self._batches, self._samples, self._watched = state["counts"]
        self._sums, self._extremes = dict(state["sums"]), state["extremes"]
        if state["calibration"] is not None:
            self._calibration = Calibration(state["calibration"].device)
            self._calibration.sums = state["calibration"]

    def means(self) -> dict[str, Any]:
        """Plain numbers; `teachers` and `temperature` are groups of them, where there are any.

        All ranks have to ask for them.
        """
        everything = EpochMetrics(self._teacher_count)
        everything._continue(_added(self.state()))
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
        """Sums of weights per class and teacher `(C, teachers)`; a teacher that is not asked has zero."""
        assert value.targets is not None
        indices, rows = value.targets.indices, len(labels)
        weights = torch.full((rows, len(indices)), 1 / len(indices), device=labels.device)
        if value.weights is not None:
            weights = value.weights.float().expand(rows, len(indices))
        by_class = torch.zeros(classes, len(indices), device=labels.device).index_add_(0, labels, weights)
        self._sum("teachers.by_class", self._placed(by_class, indices))
        self._sum("teachers.per_class", F.one_hot(labels, classes).sum(0))

    def _placed(self, values: Tensor, indices: Sequence[int]) -> Tensor:
        """Columns of the asked teachers among those of all."""
        full = values.new_zeros(*values.shape[:-1], self._teacher_count)
        for column, place in enumerate(indices):
            full[..., place] = values[..., column]
        return full

    def _watch(self, value: ObjectiveValue, logits: Tensor, batch: Batch) -> None:
        """Compare with the teachers at T = 1, before any adjustment."""
        targets = value.targets
        assert targets is not None
        weights = None if value.weights is None else _to_one(value.weights)
        mixture = soft_targets(targets.logits, weights=weights)
        self._sum("watched.agreement", (mixture.argmax(1) == logits.argmax(1)).sum())
        self._sum("watched.kl", soft_target_loss(logits, targets.logits, weights=weights).sum())
        correct = teacher_stats(targets.logits, batch.main_labels).correct
        assert correct is not None
        wrong = (~correct).sum(1).float()
        changed = torch.tensor([name != "none" for name in value.adjustments], device=wrong.device)
        self._sum("watched.wrong", self._placed(wrong, targets.indices))
        self._sum("watched.shifted", self._placed(wrong * changed, targets.indices))
        self._sum("watched.seen", self._placed(torch.full_like(wrong, len(batch)), targets.indices))

    def _teachers(self) -> dict[str, Any]:
        by_class, per_class = self._sums["teachers.by_class"], self._sums["teachers.per_class"]
        told: dict[str, Any] = {
            "weight": (by_class.sum(0) / self._samples).tolist(),
            "weight_by_class": (by_class / per_class.clamp_min(1)[:, None]).T.tolist(),
        }
        seen = self._sums["watched.seen"].clamp_min(1)
        for name in ("wrong", "shifted"):
            told[name] = (self._sums[f"watched.{name}"] / seen).tolist()
        for name in ("agreement", "kl"):
            told[name] = float(self._sums[f"watched.{name}"]) / self._watched
        return told


def _added(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What several ranks counted, as if one had."""
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
    """Weights that sum to one, so that the divergence of equals is zero."""
    return weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)
