"""Cost of each method: time of a training step over a plain one, and bytes of a view.

A step from the store and a step with the same targets held in memory, already decoded, differ by what reading
and decoding cost. Weights are untrained and images random, on which time does not depend. Every epoch is
trained as epoch `EPOCH`, in which all scheduled terms have a weight, so that all of them are computed.

A method that refuses the pair of teacher and student with its default layers has a row that says so.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from _harness import exact, measure, ratios, row
from _train_place import CLASSES, DEVICE, Place, stepper

from coursepack.console import inform
from coursepack.data.store.manifest import FEATURES
from coursepack.distill.methods import METHODS
from coursepack.distill.setup.costs import planned_store, view_costs
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.targets.live import OnlineTargets
from coursepack.distill.targets.stores import CachedTargets
from coursepack.distill.training.state import make_state
from coursepack.errors import RecipeError
from coursepack.kernels.rows import decode
from coursepack.models import build_network
from coursepack.models.taps import tap_from_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch
    from _harness import Row, Seconds

    from coursepack.data import Batch
    from coursepack.distill.setup.costs import ViewCost
    from coursepack.distill.setup.prepare import Setup
    from coursepack.distill.targets.base import Targets

EPOCH = 20
VIEW_SAMPLES = 50_000
"""Samples of a view whose bytes are reported: those of CIFAR-100."""
BARS = {"logits": "<= 0.03", "vectors": "<= 0.05", "maps": "<= 0.10"}
"""Bars of the time that the store adds to a step, over a plain step, by the largest kind of array read."""


@dataclass(frozen=True)
class Size:
    """Sizes of the measurement."""

    methods: tuple[str, ...] = tuple(
        name for name, method in METHODS.items() if not method.objective.needs().peers
    )
    """Methods of one student; `benchmarks/peers.py` has the others."""
    teacher: str = "resnet32x4"
    students: tuple[str, ...] = ("resnet8x4", "wrn-16-2")
    samples: int = 512
    batch_size: int = 64
    rounds: int = 8
    live_rounds: int = 6
    patience: float = 4.0
    """Seconds of additional rounds of one method and student, of which there are about 80."""


FULL = Size()
QUICK = Size(("kd", "fitnets"), "resnet8", ("resnet8",), 32, 16, rounds=1, live_rounds=1, patience=0)


class HeldTargets(OnlineTargets):
    """Targets of one epoch's batches, decoded and held in memory."""

    def __init__(self, setup: Setup) -> None:
        super().__init__([])
        assert setup.targets is not None
        self._held = {_key(batch): _decoded(setup.targets.fetch(batch)) for batch in setup.batches(EPOCH)}

    def fetch(self, batch: Batch, _teachers: Sequence[int] | None = None) -> Targets:
        """Return the targets of a batch."""
        return self._held[_key(batch)]


def _key(batch: Batch) -> bytes:
    return batch.samples.tobytes()


def _decoded(targets: Targets) -> Targets:
    features = {key: decode(rows) for key, rows in targets.features.items()}
    return replace(targets, logits=[decode(rows) for rows in targets.logits], features=features)


def costs(folder: Path, size: Size) -> list[Row]:
    """Measure every method with every student."""
    place = Place(folder, size.samples, (size.teacher,))
    planned = planned_store(size.teacher, CLASSES, VIEW_SAMPLES)
    stores: dict[tuple[str, ...], Path] = {}
    found = []
    for student, method in itertools.product(size.students, size.methods):
        if method == "supervised":
            continue
        (cost,) = view_costs(METHODS[method].objective, [planned], build_network(student, CLASSES))
        names = (name.removeprefix(FEATURES) for name in cost.arrays if name.startswith(FEATURES))
        taps = tuple(tap_from_name(name).text for name in names)
        if cost.arrays and taps not in stores:
            stores[taps] = folder / f"{size.teacher}-{len(stores)}.zarr"
            place.write_store(size.teacher, stores[taps], taps)
        try:
            found += _method(place, size, student, method, cost, [stores[taps]] if cost.arrays else [])
        except RecipeError as error:
            why = str(error).replace(f"{folder}/", "")
            inform(f"{student}, {method}: refused: {why}")
            found.append(exact(f"cost: {student}, {method}, refused", 1, "refusal", {"why": why}))
    return found


def _method(
    place: Place, size: Size, student: str, method: str, cost: ViewCost, stores: list[Path]
) -> list[Row]:
    def prepared(name: str = method, **fields: Any) -> Setup:
        return prepare(place.recipe(student, name, size.batch_size, **fields), DEVICE)

    setup, plain = prepared(stores=stores), prepared("supervised")
    variants = {"plain": _steps(plain), "store": _steps(setup)}
    config = {"student": student, "teacher": size.teacher, "batch": size.batch_size}
    title, bar = f"{student}, {method}", None
    if stores:
        assert isinstance(setup.targets, CachedTargets)
        variants["memory"] = _steps(replace(setup, targets=HeldTargets(setup)))
        config["reads"] = kind = _kind(setup.targets)
        bar = BARS[kind]
    rows = measure(
        variants, size.rounds, lambda seconds: _step_rows(title, seconds, config, bar), patience=size.patience
    )
    inform(f"{title}: {rows[0]['value']:.3f} times a plain step")
    rows.append(memory_row(title, setup, config))
    if stores:
        live = variants | {"live": _steps(prepared(stores=stores, online=True))}
        del live["memory"]
        rows += measure(
            live, size.live_rounds, lambda seconds: _live_rows(title, seconds, config), patience=size.patience
        )
        rows += _view_rows(title, cost, config)
    return rows


def _steps(setup: Setup) -> Callable[[], None]:
    return stepper(setup, itertools.repeat(EPOCH))


def _kind(targets: CachedTargets) -> str:
    """Return the largest kind of array that is read: logits, vectors or maps."""
    shapes = [
        reader.manifest.arrays[name].row_shape
        for reader, names in zip(targets.readers, targets.arrays, strict=True)
        for name in names
        if name.startswith(FEATURES)
    ]
    if not shapes:
        return "logits"
    return "maps" if any(len(shape) > 1 for shape in shapes) else "vectors"


def _step_rows(title: str, seconds: Seconds, config: dict[str, Any], bar: str | None) -> list[Row]:
    """Return a step's time over a plain step, the milliseconds it adds, and the share that the store adds."""
    rows = [
        row(f"cost: {title}, step / plain", ratios(seconds, "store", "plain"), "ratio", config),
        row(f"cost: {title}, step - plain", _added(seconds, "store"), "ms", config),
    ]
    if bar is not None:
        rounds = zip(seconds["store"], seconds["memory"], seconds["plain"], strict=True)
        shares = [(store - memory) / plain for store, memory, plain in rounds]
        rows += [
            row(f"cost: {title}, step from memory - plain", _added(seconds, "memory"), "ms", config),
            row(f"cost: {title}, (store - memory) / plain", shares, "ratio", config, bar),
        ]
    return rows


def _live_rows(title: str, seconds: Seconds, config: dict[str, Any]) -> list[Row]:
    """Return the milliseconds that a live teacher adds to a plain step, and cached steps over live ones."""
    return [
        row(f"cost: {title}, live step - plain", _added(seconds, "live"), "ms", config),
        row(f"cost: {title}, cached / live", ratios(seconds, "store", "live"), "ratio", config, "<= 1"),
    ]


def _added(seconds: Seconds, variant: str) -> list[float]:
    """Return the milliseconds that a variant's step takes more than a plain step, round by round."""
    return [1e3 * (step - plain) for step, plain in zip(seconds[variant], seconds["plain"], strict=True)]


def memory_row(title: str, setup: Setup, config: dict[str, Any]) -> Row:
    """Return the bytes of adapters, memories and other tensors that a method keeps beside the student.

    Gradients and momentum of those that are trained come on top.
    """
    learner = make_state(setup).learner
    kept = _tensor_bytes(learner) - _tensor_bytes(learner.network.module)
    return exact(f"cost: {title}, extra memory", kept, "bytes", config)


def _tensor_bytes(module: torch.nn.Module) -> int:
    return sum(value.nbytes for value in itertools.chain(module.parameters(), module.buffers()))


def _view_rows(title: str, cost: ViewCost, config: dict[str, Any]) -> list[Row]:
    """Return the bytes of a view of the arrays that are read, and of the same outputs unreduced."""
    config = config | {"samples": cost.samples, "arrays": list(cost.arrays)}
    rows = [exact(f"cost: {title}, view minimal", cost.samples * cost.read, "bytes", config)]
    if cost.whole is not None:
        rows.append(exact(f"cost: {title}, view full", cost.samples * cost.whole, "bytes", config))
    return rows
