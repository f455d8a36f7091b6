"""Evaluation of a network on a source without augmentation."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from coursepack.data import PRESETS, batches
from coursepack.distill.distributed import SINGLE_RANK
from coursepack.distill.losses.base import StudentOutput
from coursepack.distill.setup.student import watched
from coursepack.distill.training.learner import network_input
from coursepack.distill.training.metrics import top5_correct
from coursepack.models.calibration import Calibration

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

    from coursepack.console import Meter
    from coursepack.data import Batch, Source, ViewRecipe
    from coursepack.data.loading import Renderer
    from coursepack.distill.distributed import Ranks
    from coursepack.models import Network

BATCH_SIZE = 512
Combine = Literal["probs", "logits"]


class _Scores:
    """Metrics of one network, accumulated on the device, so that batches do not wait for each other."""

    def __init__(self, source: Source, device: torch.device) -> None:
        self._names = ["accuracy", "nll", *(["accuracy_top5"] if len(source.class_names) > 5 else [])]
        self._samples = len(source.labels)
        self._sums = torch.zeros(len(self._names), dtype=torch.float64, device=device)
        self._calibration = Calibration(device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add one batch: logits `(N, C)` float32, labels `(N,)`."""
        values = [(logits.argmax(1) == labels).sum(), F.cross_entropy(logits, labels, reduction="sum")]
        if "accuracy_top5" in self._names:
            values.append(top5_correct(logits, labels))
        self._sums += torch.stack([value.double() for value in values])
        self._calibration.add(logits, labels)

    def means(self, ranks: Ranks) -> dict[str, float]:
        """Return the metrics over the rows of all ranks."""
        ranks.all_reduce_sum(self._sums)
        ranks.all_reduce_sum(self._calibration.sums)
        means = (value / self._samples for value in self._sums.tolist())
        return {**dict(zip(self._names, means, strict=True)), "calibration_error": self._calibration.error()}


@torch.inference_mode()
def evaluate(
    network: Network,
    source: Source,
    device: torch.device,
    *,
    renderer: Renderer | None = None,
    meter: Meter | None = None,
    ranks: Ranks = SINGLE_RANK,
) -> dict[str, float]:
    """Return the accuracy, negative log-likelihood in nats and calibration error of a network on a source.

    Top-5 accuracy is included for more than five classes. Metrics are computed in float32. With several
    ranks, each evaluates its share of every batch and all return the metrics of the whole source.

    Args:
        network: the network; evaluated in eval mode and restored to its mode.
        source: images and labels, rendered with `evaluation_view`.
        device: device of the network.
        renderer: renders batches ahead in worker processes; None renders in this process.
        meter: progress display.
        ranks: processes that share the evaluation.
    """
    scores = _Scores(source, device)
    for logits, labels in predict(network, source, device, renderer=renderer, meter=meter, ranks=ranks):
        scores.add(logits, labels)
    return scores.means(ranks)


@torch.inference_mode()
def predict(
    network: Network,
    source: Source,
    device: torch.device,
    *,
    renderer: Renderer | None = None,
    meter: Meter | None = None,
    ranks: Ranks = SINGLE_RANK,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits `(N, C)` float32 and labels `(N,)` of every batch of a source, in index order.

    Arguments as for `evaluate`.
    """
    with _evaluating(network.module):
        for batch in _batches(source, device, renderer, meter, ranks):
            images = network_input(batch, network.preprocessing)
            yield network.module(images).float(), batch.main_labels


@torch.inference_mode()
def evaluate_together(
    networks: Sequence[Network],
    source: Source,
    device: torch.device,
    *,
    watch: Watch | None = None,
    renderer: Renderer | None = None,
    meter: Meter | None = None,
    ranks: Ranks = SINGLE_RANK,
) -> tuple[list[dict[str, float]], dict[str, dict[str, float]]]:
    """Return the metrics of several networks, and those of their ensembles by name.

    Ensemble `ensemble` is the mean of their probabilities.

    Args:
        networks: the networks.
        source, device, renderer, meter, ranks: as for `evaluate`.
        watch: layers to capture of each network, and what makes further ensembles of the outputs; None if
            there are no further ones.
    """
    scores: dict[str, _Scores] = {}
    with ExitStack() as stack:
        for network in networks:
            stack.enter_context(_evaluating(network.module))
        if watch is not None:
            stack.enter_context(_evaluating(watch.module))
        for batch in _batches(source, device, renderer, meter, ranks):
            outputs = [
                _output(network, batch, None if watch is None else watch.needs[index])
                for index, network in enumerate(networks)
            ]
            logits = {str(index): output.logits for index, output in enumerate(outputs)}
            logits["ensemble"] = torch.stack([each.log_softmax(1) for each in logits.values()]).logsumexp(0)
            logits |= {} if watch is None else watch.module.ensembles(outputs)
            for name, each in logits.items():
                scores.setdefault(name, _Scores(source, device)).add(each.float(), batch.main_labels)
    means = {name: each.means(ranks) for name, each in scores.items()}
    return [means.pop(str(index)) for index in range(len(networks))], means


@torch.inference_mode()
def evaluate_ensemble(
    networks: Sequence[Network],
    source: Source,
    device: torch.device,
    *,
    combine: Combine = "probs",
    renderer: Renderer | None = None,
    meter: Meter | None = None,
) -> dict[str, float]:
    """Return the metrics of `evaluate` for the average of several networks: of their probabilities or logits.

    Other arguments as for `evaluate`.
    """
    scores = _Scores(source, device)
    with ExitStack() as stack:
        for network in networks:
            stack.enter_context(_evaluating(network.module))
        for batch in _batches(source, device, renderer, meter, SINGLE_RANK):
            logits = torch.stack([_output(network, batch, None).logits for network in networks])
            mean = logits.mean(0) if combine == "logits" else logits.log_softmax(2).logsumexp(0)
            scores.add(mean, batch.main_labels)
    return scores.means(SINGLE_RANK)


@dataclass(frozen=True)
class Watch:
    """Exchange that makes ensembles of students' outputs, and what it reads of each student."""

    module: Any
    """Exchange with a method `ensembles`."""
    needs: Sequence[dict[str, Any]]
    """Arguments of `watched` for each student."""


def _output(network: Network, batch: Batch, needs: dict[str, Any] | None) -> StudentOutput:
    images = network_input(batch, network.preprocessing)
    if needs is None:
        return StudentOutput(network.module(images).float())
    with watched(network, **needs) as output:
        return output(network.module(images)).float()


def _batches(
    source: Source, device: torch.device, renderer: Renderer | None, meter: Meter | None, ranks: Ranks
) -> Iterator[Batch]:
    """Yield this rank's part of every batch of a source's samples, in index order."""
    samples, recipe = np.arange(len(source.labels)), evaluation_view(source)
    of_all = batches(
        source, recipe, samples, views=[0], batch_size=BATCH_SIZE, device=device, part=ranks.part
    )
    nonempty = (batch for batch in of_all if len(batch))
    for batch in nonempty if renderer is None else renderer.ahead(nonempty):
        yield batch
        if meter is not None:
            meter.advance(len(batch))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Set a module to eval mode inside the context."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


EVALUATION_VIEWS = {True: PRESETS["none"], False: PRESETS["eval"]}
"""View recipe for evaluation, by whether the images are whole in memory."""


def evaluation_view(source: Source) -> ViewRecipe:
    """Return the view recipe for evaluation: whole images for small ones, a center crop for image files."""
    return EVALUATION_VIEWS[source.in_memory is not None]
