"""A look inside the student: what its head reads, outputs of its layers, and their shapes."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from coursepack.distill.losses.base import Inside
from coursepack.errors import RecipeError
from coursepack.models.taps import tapped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from coursepack.models import Network

UNFIT = (RuntimeError, AssertionError)
"""What networks raise for images of a size that they are not made for; vision transformers assert."""


def wrong_size(network: Network, error: Exception) -> RecipeError:
    """What to tell of a student that raised one of `UNFIT` for an image."""
    size = network.preprocessing.size
    return RecipeError(
        f"student {network.spec!r} cannot take views of {size} x {size} pixels: {error}. Choose another "
        "student_size, or leave it out"
    )


@contextmanager
def watched(
    network: Network, layers: Sequence[str], *, representation: bool, layer: str | None
) -> Iterator[Callable[[], Inside]]:
    """Catch what is asked for on the forward pass inside the context.

    Args:
        network: the student.
        layers: dotted names of layers whose outputs are wanted.
        representation: whether a representation of each sample is wanted.
        layer: the layer, among `layers`, whose largest values over places are it; None means what the last
            linear layer reads.

    Yields:
        A function that gives what was caught, once the pass is over.
    """
    read: list[Tensor] = []
    with ExitStack() as stack:
        caught = stack.enter_context(tapped(network.module, layers))
        if representation and layer is None:
            handle = _head(network).register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0]))
            stack.callback(handle.remove)

        def inside() -> Inside:
            found = read[-1] if read else None
            if representation and layer is not None:
                found = caught[layer].flatten(2).amax(2) if caught[layer].ndim > 2 else caught[layer]
            return Inside(found, caught)

        yield inside


def _head(network: Network) -> nn.Linear:
    heads = [module for module in network.module.modules() if isinstance(module, nn.Linear)]
    if not heads or heads[-1].out_features != network.classes:
        raise RecipeError(
            f"student {network.spec!r} does not end in a linear layer of {network.classes} classes: say "
            "which layer represents a sample with --set objective.fusion.layer=LAYER"
        )
    return heads[-1]


@torch.inference_mode()
def look_inside(
    network: Network, channels: int, layers: Sequence[str], *, representation: bool, layer: str | None
) -> tuple[int, dict[str, tuple[int, ...]]]:
    """Width of the representation (0 if none is asked for) and shape of one sample's features per layer.

    Runs one black image.

    Raises:
        UnknownName: a layer that the student does not have.
        RecipeError: a size that it cannot take, a layer that does not run, or nothing that represents a
            sample: outputs that are neither vectors nor maps.
    """
    module, size = network.module, network.preprocessing.size
    device = next(module.parameters()).device
    was_training = module.training
    module.eval()
    pixels = torch.zeros(1, size, size, channels, dtype=torch.uint8, device=device)
    with watched(network, layers, representation=representation, layer=layer) as inside:
        try:
            module(network.preprocessing(pixels))
        except UNFIT as error:
            raise wrong_size(network, error) from error
        unused = [name for name in layers if name not in inside().features]
        if unused:
            raise RecipeError(
                f"student {network.spec!r} never runs its layer {unused[0]!r}: name another layer"
            )
        seen = inside()
        shape = tuple(seen.features[layer].shape[1:]) if representation and layer is not None else ()
        if shape and len(shape) not in (1, 3):
            raise RecipeError(
                f"layer {layer!r} of student {network.spec!r} cannot represent a sample (shape {shape}): it "
                "takes vectors (D,) and maps (C, H, W). Name another with "
                "--set objective.fusion.layer=LAYER, or leave it out for what the head reads"
            )
    module.train(was_training)
    width = 0 if seen.representation is None else seen.representation.shape[1]
    return width, {name: tuple(seen.features[name].shape[1:]) for name in layers}


def blocks(module: nn.Module) -> list[str]:
    """Names of a network's parts, shallow to deep: its children that have weights, without the head."""
    parts = [name for name, child in module.named_children() if any(True for _ in child.parameters())]
    return parts[:-1] or parts


def depth_of(module: nn.Module) -> dict[str, int]:
    """Every submodule's place in the order of the network."""
    return {name: place for place, (name, _) in enumerate(module.named_modules()) if name}
