"""Collections of networks that are not defined in this package, one module per hub.

A new hub is a module with the functions of `Hub` and a row in `HUBS`.
"""

from __future__ import annotations

from coursepack.models.hubs import projected, python, timm, torchvision
from coursepack.models.hubs.base import Hub as Hub
from coursepack.models.hubs.base import HubNetwork as HubNetwork

HUBS = {
    "torchvision": Hub(
        form="torchvision:NAME",
        build=torchvision.build,
        load=torchvision.load,
        weights_help=", or the name of torchvision's weights",
        unused_weights=torchvision.AUXILIARY_HEADS,
    ),
    "timm": Hub(form="timm:NAME", build=timm.build),
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


def find_hub(spec: str) -> tuple[Hub | None, str]:
    """Return the hub of a spec, or None if the prefix is not one of `HUBS`, and the name within the hub."""
    prefix, _, name = spec.partition(":")
    return HUBS.get(prefix), name
