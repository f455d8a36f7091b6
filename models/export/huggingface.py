"""Folder for transformers, whose wrapper of timm runs networks of timm.

Networks of torchvision with the layers and the layer names of one of timm's leave as that one. Others are
refused: transformers has no class for them, and a folder with code of its own would have to be trusted by
whoever loads it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safetensors.torch import save

from coursepack.errors import RecipeError
from coursepack.files import write_whole
from coursepack.models.export.base import missing_extra
from coursepack.models.load import load_teacher

if TYPE_CHECKING:
    from pathlib import Path

    from coursepack.models.build import Network
    from coursepack.models.card import Card

TORCHVISION = frozenset(
    {
        *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
        *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
        *("densenet121", "densenet161", "densenet169", "densenet201"),
    }
)
"""Networks of torchvision that timm has under the same name with the same layers."""


def check(network: Network) -> None:
    """Check that transformers can run the network, and that its libraries are installed.

    Raises:
        RecipeError: it cannot, or they are not.
    """
    _architecture(network)
    try:
        import timm  # noqa: F401 - only to see whether they are installed
        import transformers  # noqa: F401
    except ImportError as error:
        raise missing_extra("hf", "timm and transformers", error) from error


def _architecture(network: Network) -> str:
    """Return timm's name of a network."""
    hub, _, name = network.spec.partition(":")
    if hub == "timm":
        return name.partition(".")[0]
    if hub == "torchvision" and name in TORCHVISION:
        return name
    raise RecipeError(
        f"network {network.spec!r} has no class in transformers: --format hf takes students timm:NAME, and "
        f"torchvision:NAME for {', '.join(sorted(TORCHVISION))}. Use --format onnx, which needs no code of "
        "the network, or safetensors"
    )


def write(network: Network, card: Card, path: Path) -> None:
    """Write config.json, from which the image processor is read too, and model.safetensors.

    Weights have timm's names, as in the repositories of timm, so that timm reads the folder as well.
    """
    import transformers

    pixels, architecture = card.preprocessing, _architecture(network)
    names, size = card.class_names, pixels.size
    make: Any = transformers.TimmWrapperConfig  # its fields in config.json are not among its typed ones
    config = make(
        architecture=architecture,
        model_args=_arguments(network, architecture),
        pretrained_cfg={
            "architecture": architecture,
            "input_size": [pixels.channels, size, size],
            "mean": list(pixels.mean),
            "std": list(pixels.std),
            "interpolation": "bilinear",
            "crop_pct": card.crop,
            "crop_mode": "center",
        },
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    config.save_pretrained(path)
    state = {name: value.detach().cpu().contiguous() for name, value in network.module.state_dict().items()}
    write_whole(path / "model.safetensors", save(state, {"format": "pt", **card.metadata()}))


def _arguments(network: Network, architecture: str) -> dict[str, Any]:
    """Return the arguments of `timm.create_model` beside the number of classes."""
    import timm

    published = timm.models.get_pretrained_cfg(architecture)
    is_fixed = published is not None and published.fixed_input_size
    return {"img_size": network.preprocessing.size} if is_fixed else {}


def reload(path: Path, card: Card) -> Network:
    """Load the folder as a teacher."""
    return load_teacher(f"hf:{path}", card.class_names)
