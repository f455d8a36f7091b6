"""Networks of the user's own: `python:MODULE:FACTORY` calls `factory(classes)`.

The factory returns a `torch.nn.Module` whose output is logits `(N, classes)`. An optional attribute
`preprocessing` of the module gives the pixels it expects: `{"size": 32, "mean": [...], "std": [...]}`.
"""

from __future__ import annotations

from torch import nn

from coursepack.config import parse_config
from coursepack.errors import CoursepackError, RecipeError
from coursepack.imports import import_object
from coursepack.models.hubs.base import HubNetwork
from coursepack.models.preprocessing import Preprocessing

OWN_WEIGHTS = "own"
"""Name of the weights that a factory's network already has."""


def build(name: str, classes: int, _size: int | None = None) -> HubNetwork:
    """Call a factory and return its network.

    Args:
        name: `module:factory`; the factory may be a dotted name.
        classes: number of classes C.

    Raises:
        RecipeError: there is no such factory, it fails, or it does not return a network.
    """
    spec = f"python:{name}"
    module_name, _, path = name.partition(":")
    if not (module_name and path):
        raise RecipeError(f"network {spec!r} is not python:MODULE:FACTORY")
    factory = import_object(module_name, path, f"network {spec!r}")
    try:
        module = factory(classes)
    except CoursepackError:
        raise
    except Exception as error:
        raise RecipeError(
            f"network {spec!r}: {path}({classes}) failed: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, nn.Module):
        raise RecipeError(
            f"network {spec!r}: {path} returned a {type(module).__name__}, expected a torch.nn.Module"
        )
    preprocessing = getattr(module, "preprocessing", None)
    if preprocessing is not None and not isinstance(preprocessing, Preprocessing):
        preprocessing = parse_config(Preprocessing, preprocessing, f"the preprocessing of network {spec!r}")
    return HubNetwork(module, preprocessing, classes)


def load(name: str, weights: str, classes: int) -> HubNetwork | None:
    """Return a factory's network with the weights that it comes with; None for other weights than `own`."""
    return build(name, classes) if weights == OWN_WEIGHTS else None
