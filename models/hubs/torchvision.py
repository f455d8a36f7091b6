"""Classification networks of torchvision, with the size and normalization of their published weights.

Weights are downloaded only if they are requested by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coursepack.errors import RecipeError, UnknownName, first_line
from coursepack.models.hubs.base import HubNetwork
from coursepack.models.preprocessing import Preprocessing

if TYPE_CHECKING:
    from torch import nn

AUXILIARY_HEADS = ("AuxLogits.", "aux1.", "aux2.")
"""Prefixes of the heads that GoogLeNet and Inception use only in training; networks built here have none."""
# Without auxiliary heads the networks return plain logits in training mode too. torchvision's own weights
# expect the second normalization inside the network (transform_input), so files of such weights need it.
_WITHOUT_AUXILIARY = {"init_weights": True, "aux_logits": False, "transform_input": True}


def build(name: str, classes: int, size: int | None) -> HubNetwork:
    """Build a classification network of torchvision with fresh weights.

    Args:
        name: one of `torchvision.models.list_models`.
        classes: number of classes C.
        size: side of the images in pixels, used by vision transformers only. Defaults to the size of the
            published weights.

    Raises:
        UnknownName: torchvision has no such network.
    """
    import torchvision.models as zoo

    preprocessing = _preprocessing(_published_weights(name).DEFAULT)
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = _WITHOUT_AUXILIARY
    elif name.startswith("vit_"):
        options = {"image_size": size or preprocessing.size}
    module: nn.Module = zoo.get_model(name, weights=None, num_classes=classes, **options)
    return HubNetwork(module, preprocessing, classes)


def load(name: str, weights: str, _classes: int) -> HubNetwork:
    """Load a network of torchvision with published weights, such as `IMAGENET1K_V2`.

    Raises:
        UnknownName: torchvision has no such network, or no such weights for it.
        RecipeError: the weights cannot be downloaded.
    """
    import torchvision.models as zoo

    members = _published_weights(name).__members__
    if weights not in members:
        raise UnknownName(f"weights of 'torchvision:{name}'", weights, members)
    member = members[weights]
    try:
        module: nn.Module = zoo.get_model(name, weights=member)
    except OSError as error:
        raise RecipeError(
            f"weights {weights!r} of network 'torchvision:{name}' cannot be fetched: {first_line(error)}. "
            f"Fetch {member.url} where there is a network, and give the file as --weights"
        ) from error
    return HubNetwork(module, _preprocessing(member), len(member.meta["categories"]))


def class_names(name: str, weights: str | None) -> tuple[str, ...] | None:
    """Return the names of the classes of published weights; None for weights from a file."""
    members = _published_weights(name).__members__
    return tuple(members[weights].meta["categories"]) if weights in members else None


def _published_weights(name: str) -> Any:
    import torchvision.models as zoo

    known = zoo.list_models(module=zoo)
    if name not in known:
        raise UnknownName("torchvision network", name, known)
    return zoo.get_model_weights(name)


def _preprocessing(weights: Any) -> Preprocessing:
    transforms = weights.transforms()
    return Preprocessing(size=transforms.crop_size[0], mean=tuple(transforms.mean), std=tuple(transforms.std))
