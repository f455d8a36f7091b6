"""Evaluation of finished runs: of a student, or of the students of a group and their ensembles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coursepack.console import progress
from coursepack.data import open_source
from coursepack.data.loading import Renderer
from coursepack.distill.exchange import EXCHANGES
from coursepack.distill.exchange.base import GroupContext, MemberShapes
from coursepack.distill.runs.folder import EXCHANGE_FILE, load_runs
from coursepack.distill.setup.student import last_map, probe_student
from coursepack.distill.training.evaluate import Watch, evaluate, evaluate_together, evaluation_view
from coursepack.errors import CoursepackError, RunError
from coursepack.imports import check_trusted
from coursepack.models import load_teacher
from coursepack.models.build import seeded
from coursepack.models.weights import read_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn

    from coursepack.data import Source
    from coursepack.distill.runs.folder import FinishedRun
    from coursepack.models import Network


@dataclass(frozen=True)
class Evaluated:
    """Metrics of a student, or of an ensemble of the students of a group."""

    path: Path
    """Folder of the student's run, or of the group."""
    ensemble: str
    """Name of the ensemble; empty for a student."""
    metrics: dict[str, float]


def evaluate_run(
    path: Path,
    *,
    device: torch.device,
    source: str | None = None,
    root: Path | None = None,
    trust_code: bool = False,
) -> tuple[Source, list[Evaluated]]:
    """Evaluate the student of a finished run, or every student of a group and then their ensembles.

    Args:
        path: folder of the run or group.
        device: device to evaluate on.
        source: evaluation data, NAME:SPLIT. Defaults to the run's.
        root: folder of the source's files. Defaults to the run's.
        trust_code: allow the run to name Python code for its evaluation data or its networks.

    Returns:
        The evaluation data, and the metrics.

    Raises:
        RunError: there is no finished run, or the weights of the group's exchange cannot be loaded.
        UntrustedCode: the run names Python code, and `trust_code` is false.
        TeacherMismatch: the evaluation data have other classes.
    """
    students = [run for run in load_runs(path) if not run.ensemble]
    recipe = students[0].recipe
    name = source or check_trusted(recipe.evaluation, f"run {str(path)!r}", trust_code=trust_code)
    data = open_source(name, root or (Path(recipe.root) if recipe.root else None))
    networks = [load_teacher(f"run:{run.path}", data.class_names, trust_code=trust_code) for run in students]
    watch = _load_watch(path, students, networks, data) if len(students) > 1 else None
    for module in [network.module for network in networks] + ([] if watch is None else [watch.module]):
        module.to(device)
    sizes = sorted({network.preprocessing.size for network in networks})
    with (
        progress(f"eval {path.name}", len(data.labels), "samples") as meter,
        Renderer(data, evaluation_view(data), sizes, pin=device.type == "cuda") as renderer,
    ):
        if len(students) == 1:
            metrics = evaluate(networks[0], data, device, renderer=renderer, meter=meter)
            return data, [Evaluated(path, "", metrics)]
        each, ensembles = evaluate_together(
            networks, data, device, watch=watch, renderer=renderer, meter=meter
        )
    found = [Evaluated(run.path, "", metrics) for run, metrics in zip(students, each, strict=True)]
    others = sorted(ensembles.keys() - {"ensemble"})
    return data, found + [Evaluated(path, name, ensembles[name]) for name in (*others, "ensemble")]


def _load_watch(
    path: Path, students: Sequence[FinishedRun], networks: Sequence[Network], source: Source
) -> Watch | None:
    """Load the exchange of a finished group, or return None if it makes no ensembles of its own."""
    recipe = students[0].recipe
    config = recipe.objective.exchange
    members = [
        _member(run, network, source.channels) for run, network in zip(students, networks, strict=True)
    ]
    shapes = tuple(shapes for shapes, _ in members)
    with seeded(recipe.seed):
        exchange = EXCHANGES[config.name].build(
            config, GroupContext(shapes, len(source.class_names), recipe.seed, tuple(networks))
        )
    if not hasattr(exchange, "ensembles"):
        return None
    if any(value.requires_grad for value in exchange.parameters()):
        _load_weights(exchange, path / EXCHANGE_FILE, config.name)
    return Watch(exchange, [needs for _, needs in members])


def _member(run: FinishedRun, network: Network, channels: int) -> tuple[MemberShapes, dict[str, Any]]:
    """Return the shapes of what the exchange reads of a student, and the arguments of `watched` for it."""
    needs = run.recipe.objective.needs()
    layer = last_map(network, channels) if needs.last_map else ""
    watched: dict[str, Any] = {
        "layers": [name for name in dict.fromkeys((layer, needs.embedding_layer)) if name],
        "embedding": bool(needs.embedding),
        "embedding_layer": needs.embedding_layer,
    }
    shapes = probe_student(network, channels, **watched)
    return MemberShapes(shapes.embedding_width, layer, shapes.features.get(layer, ())), watched


def _load_weights(exchange: nn.Module, path: Path, name: str) -> None:
    try:
        exchange.load_state_dict(dict(read_weights(path)))
    except CoursepackError as error:
        raise RunError(f"the weights of exchange {name!r} cannot be read: {error}") from error
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(
            f"weights {str(path)!r} are not of exchange {name!r} between these students: {reason}"
        ) from error
