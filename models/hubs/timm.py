"""Networks of timm, with the size and normalization of their published weights.

Nothing is downloaded: weights come from a file.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from coursepack.errors import RecipeError, UnknownName
from coursepack.models.hubs.base import HubNetwork
from coursepack.models.preprocessing import Preprocessing

if TYPE_CHECKING:
    from torch import nn

MAX_NAMES = 10
"""Number of timm's names that an error message lists."""


def build(name: str, classes: int, size: int | None) -> HubNetwork:
    """Build a network of timm with fresh weights.

    Args:
        name: one of `timm.list_models`, optionally followed by a dot and the tag of published weights. The
            tag selects size and normalization.
        classes: number of classes C.
        size: side of the images in pixels, used by networks that are built for a fixed size. Defaults to the
            size of the published weights.

    Raises:
        UnknownName: timm has no such network, or no such tag for it.
        RecipeError: timm is not installed, or the network expects images that are not square.
    """
    try:
        import timm
    except ImportError as error:
        raise RecipeError(
            f"network 'timm:{name}' needs timm, which cannot be imported: {error}. "
            "Get it with `pip install 'coursepack[teachers]'`"
        ) from error
    # timm would contact a server for a name such as hf-hub:...
    if not timm.is_model(name):
        known = timm.list_models()
        near = difflib.get_close_matches(name, known, n=MAX_NAMES, cutoff=0.4) or known[:MAX_NAMES]
        raise UnknownName("timm network", name, [*near, f"and {len(known) - len(near)} more of timm's"])
    try:
        published: Any = timm.models.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        tags = timm.list_pretrained(name.partition(".")[0] + ".*")
        raise UnknownName("timm network", name, tags) from error
    height, width = published.input_size[1:]
    if height != width:
        raise RecipeError(
            f"network 'timm:{name}' reads images of {height} x {width} pixels, but views are square: "
            "use another network"
        )
    options: dict[str, Any] = {"img_size": size} if published.fixed_input_size and size is not None else {}
    module: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes, **options)
    preprocessing = Preprocessing(size=height, mean=tuple(published.mean), std=tuple(published.std))
    return HubNetwork(module, preprocessing, classes)
