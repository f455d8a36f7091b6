"""Collections of networks that are not defined in this package, one module per hub.

A new hub is a module with the functions of `Hub` and a row in `HUBS`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from coursepack.models.hubs import exported, huggingface, onnx, projected, python, timm, torchvision
from coursepack.models.hubs.base import Hub as Hub
from coursepack.models.hubs.base import HubNetwork as HubNetwork

if TYPE_CHECKING:
    from collections.abc import Callable

HUBS = {
    "torchvision": Hub(
        form="torchvision:NAME",
        build=torchvision.build,
        load=torchvision.load,
        class_names=torchvision.class_names,
        weights_help=", or the name of torchvision's weights",
        unused_weights=torchvision.AUXILIARY_HEADS,
    ),
    "timm": Hub(
        form="timm:NAME",
        build=timm.build,
        load=timm.load,
        load_trained=timm.load_trained,
        trained_names=timm.TRAINED,
        class_names=timm.class_names,
        weights_help=", or the tag of timm's weights",
    ),
    "hf": Hub(
        form="hf:FOLDER",
        load_trained=huggingface.load_trained,
        class_names=huggingface.class_names,
    ),
    "onnx": Hub(form="onnx:FILE", load_trained=onnx.load_trained, class_names=onnx.class_names),
    "exported": Hub(form="exported:FILE.pt2", load_trained=exported.load_trained),
    "python": Hub(
        form="python:MODULE:FACTORY",
        build=python.build,
        load=python.load,
        weights_help=f", or --weights {python.OWN_WEIGHTS} if the factory returns a trained network",
        check_output=True,
    ),
    "projected": Hub(form=projected.FORM, build=projected.build),
}
"""Hubs by the prefix of their specs."""


def has_weights(spec: str | None) -> bool:
    """Return true if a spec names a trained network that needs no `--weights`; `run:FOLDER` is not a hub's.

    >>> has_weights("hf:folder"), has_weights("timm:resnet18"), has_weights(None)
    (True, False, False)
    """
    return trained_loader(spec or "") is not None


def trained_loader(spec: str) -> Callable[[int | None, bool], HubNetwork] | None:
    """Return a function of size and `trust_code` that loads a trained network, as `Hub.load_trained` does.

    None if the spec does not name a trained network.
    """
    hub, name = find_hub(spec)
    if hub is None or hub.load_trained is None or not name.startswith(hub.trained_names):
        return None
    return partial(hub.load_trained, name)


def find_hub(spec: str) -> tuple[Hub | None, str]:
    """Return the hub of a spec, or None if the prefix is not one of `HUBS`, and the name within the hub."""
    prefix, _, name = spec.partition(":")
    return HUBS.get(prefix), name
