"""Teachers as their stores describe them: accuracy, network without weights, and shapes of taps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from coursepack.errors import CoursepackError
from coursepack.imports import names_code
from coursepack.models import build_network
from coursepack.models.taps import tap_from_name, tap_margins, tapped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coursepack.data.store import Manifest
    from coursepack.models import Network

Shapes = dict[str, tuple[int, ...]]
"""Shape of one sample's features by the name of a tap or a layer."""


def accuracy(manifest: Manifest) -> float:
    """Return a teacher's accuracy over all views recorded in its store."""
    return manifest.totals["correct"] / max(manifest.totals["rows"], 1.0)


def untrained(manifest: Manifest) -> Network | None:
    """Return a teacher's network without its weights; None for user code, which stores must not run."""
    teacher = manifest.identity["teacher"]
    if names_code(teacher["network"]):
        return None
    try:
        return build_network(
            teacher["network"], len(manifest.class_names), size=teacher.get("preprocessing", {}).get("size")
        )
    except CoursepackError:
        return None


@torch.inference_mode()
def tap_shapes(manifest: Manifest, taps: Sequence[str]) -> Shapes | None:
    """Return the shapes of taps and of their layers' whole outputs; None if the teacher cannot be built.

    Raises:
        UnknownName: a tap's layer does not exist.
    """
    network = untrained(manifest) if taps else None
    if network is None:
        return {} if not taps else None
    module, pixels = network.module.eval(), network.preprocessing
    layers = list(dict.fromkeys(layer for tap in taps for layer in tap_from_name(tap).layers))
    with tapped(module, layers) as outputs:
        module(pixels(torch.zeros(1, pixels.size, pixels.size, len(pixels.mean), dtype=torch.uint8)))
        shapes = {layer: tuple(outputs[layer].shape[1:]) for layer in layers}
        for tap in map(tap_from_name, taps):
            reduced = tap.reduce([outputs[layer] for layer in tap.layers], tap_margins(module, tap))
            shapes[tap.name] = tuple(reduced.shape[1:])
    return shapes
