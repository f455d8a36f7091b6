"""Networks of torchvision and timm by name, with the pixels that their published weights expect.

No weights are looked for, except torchvision's if they are asked for by name.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from coursepack.errors import RecipeError, UnknownName
from coursepack.models.preprocessing import Preprocessing

if TYPE_CHECKING:
    from torch import nn

# Both would give their auxiliary heads' logits besides their own in training. They normalise once more
# themselves in torchvision's own weights; so they do here, for such weights to fit from a file.
_AUXILIARY = {"init_weights": True, "aux_logits": False, "transform_input": True}
_NAMED = 10
"""Names of timm's in the text of an error."""


def torchvision_network(name: str, classes: int, size: int | None) -> tuple[nn.Module, Preprocessing]:
    """A classification network of torchvision's with fresh weights.

    Args:
        name: as `torchvision.models.list_models` gives it.
        classes: C.
        size: side of images in pixels, for a vision transformer that is built for one; None means its usual.

    Raises:
        UnknownName: no such network.
    """
    import torchvision.models as zoo

    preprocessing = _published(_torchvision_weights(name).DEFAULT)
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = _AUXILIARY
    elif name.startswith("vit_"):
        options = {"image_size": size or preprocessing.size}
    module: nn.Module = zoo.get_model(name, weights=None, num_classes=classes, **options)
    return module, preprocessing


def torchvision_trained(name: str, weights: str) -> tuple[nn.Module, Preprocessing, int]:
    """A network of torchvision's with weights of a name, what pixels those expect, and their classes.

    Raises:
        UnknownName: no such network, or no such weights of it.
    """
    import torchvision.models as zoo

    members = _torchvision_weights(name).__members__
    if weights not in members:
        raise UnknownName(f"weights of 'torchvision:{name}'", weights, members)
    member = members[weights]
    module: nn.Module = zoo.get_model(name, weights=member)
    return module, _published(member), len(member.meta["categories"])


def _torchvision_weights(name: str) -> Any:
    import torchvision.models as zoo

    known = zoo.list_models(module=zoo)
    if name not in known:
        raise UnknownName("torchvision network", name, known)
    return zoo.get_model_weights(name)


def _published(weights: Any) -> Preprocessing:
    transforms = weights.transforms()
    return Preprocessing(size=transforms.crop_size[0], mean=tuple(transforms.mean), std=tuple(transforms.std))


def timm_network(name: str, classes: int, size: int | None) -> tuple[nn.Module, Preprocessing]:
    """A network of timm's with fresh weights.

    Args:
        name: as `timm.list_models` gives it, with the tag of its published weights or without: the tag
            decides size and normalisation.
        classes: C.
        size: side of images in pixels, for a network that is built for one; None means its usual.

    Raises:
        UnknownName: no such network, or no such tag of it.
        RecipeError: timm is not installed, or the network's images are not square.
    """
    try:
        import timm
    except ImportError as error:
        raise RecipeError(
            f"network 'timm:{name}' needs timm, which cannot be imported: {error}. "
            "Get it with `pip install 'coursepack[teachers]'`"
        ) from error
    # timm would ask a server for a name such as hf-hub:...
    if not timm.is_model(name):
        known = timm.list_models()
        near = difflib.get_close_matches(name, known, n=_NAMED, cutoff=0.4) or known[:_NAMED]
        raise UnknownName("timm network", name, [*near, f"and {len(known) - len(near)} more of timm's"])
    try:
        published = timm.models.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        tags = timm.list_pretrained(name.partition(".")[0] + ".*")
        raise UnknownName("timm network", name, tags) from error
    height, width = published.input_size[1:]
    if height != width:
        raise RecipeError(
            f"network 'timm:{name}' reads images of {height} x {width} pixels, but views are square: "
            "use another network"
        )
    options = {"img_size": size} if published.fixed_input_size and size is not None else {}
    module: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes, **options)
    preprocessing = Preprocessing(size=height, mean=tuple(published.mean), std=tuple(published.std))
    return module, preprocessing
