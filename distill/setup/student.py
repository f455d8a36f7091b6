"""Outputs of a student: its logits, watched layers and the input of its head, and their shapes."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from coursepack.distill.losses.base import StudentOutput
from coursepack.errors import RecipeError
from coursepack.models.taps import tapped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from coursepack.models import Network

UNFIT = (RuntimeError, AssertionError)
"""Errors that networks raise for images of a size that they are not made for; vision transformers assert."""


def wrong_size(network: Network, error: Exception) -> RecipeError:
    """Return the error for a student that raised one of `UNFIT` for an image."""
    size = network.preprocessing.size
    return RecipeError(
        f"student {network.spec!r} cannot take views of {size} x {size} pixels: {error}. Choose another "
        "student_size, or leave it out"
    )


@contextmanager
def watched(
    network: Network, layers: Sequence[str], *, embedding: bool, embedding_layer: str | None = None
) -> Iterator[Callable[[Tensor], StudentOutput]]:
    """Capture outputs of layers, and an embedding of each sample, on the forward pass inside the context.

    Args:
        network: the student.
        layers: dotted names of layers whose outputs are wanted.
        embedding: true if an embedding of each sample is wanted.
        embedding_layer: the layer, among `layers`, whose maximum over positions is the embedding; None means
            the input of the last linear layer.

    Yields:
        A function from the student's logits to the whole output, to be called once the pass is over.
    """
    read: list[Tensor] = []
    with ExitStack() as stack:
        caught = stack.enter_context(tapped(network.module, layers))
        if embedding and embedding_layer is None:
            handle = _head(network).register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0]))
            stack.callback(handle.remove)

        def output(logits: Tensor) -> StudentOutput:
            found = read[-1] if read else None
            if embedding and embedding_layer is not None:
                features = caught[embedding_layer]
                found = features.flatten(2).amax(2) if features.ndim > 2 else features
            return StudentOutput(logits, found, caught)

        yield output


def _head(network: Network) -> nn.Linear:
    heads = [module for module in network.module.modules() if isinstance(module, nn.Linear)]
    if not heads or heads[-1].out_features != network.classes:
        raise RecipeError(
            f"student {network.spec!r} does not end in a linear layer of {network.classes} classes: say "
            "which layer represents a sample with --set objective.fusion.layer=LAYER"
        )
    return heads[-1]


@dataclass(frozen=True)
class StudentShapes:
    """Shapes of a student's output for one sample."""

    logits: tuple[int, ...]
    embedding_width: int
    """D of the embedding; 0 if none was asked for."""
    features: dict[str, tuple[int, ...]]
    """Shape of each watched layer's output by layer name."""


@torch.inference_mode()
def probe_student(
    network: Network,
    channels: int,
    layers: Sequence[str] = (),
    *,
    embedding: bool = False,
    embedding_layer: str | None = None,
) -> StudentShapes:
    """Run one black image, and return the shapes of everything that training reads of the student.

    Raises:
        UnknownName: a layer that the student does not have.
        RecipeError: a size that it cannot take, a layer that does not run, or no usable embedding: an output
            that is neither a vector nor a map.
    """
    module, size = network.module, network.preprocessing.size
    device = next(module.parameters()).device
    was_training = module.training
    module.eval()
    pixels = torch.zeros(1, size, size, channels, dtype=torch.uint8, device=device)
    layers = list(dict.fromkeys([*layers, *([] if embedding_layer is None else [embedding_layer])]))
    with watched(network, layers, embedding=embedding, embedding_layer=embedding_layer) as output:
        try:
            logits = module(network.preprocessing(pixels))
        except UNFIT as error:
            raise wrong_size(network, error) from error
        seen = output(logits)
        unused = [name for name in layers if name not in seen.features]
        if unused:
            raise RecipeError(
                f"student {network.spec!r} never runs its layer {unused[0]!r}: name another layer"
            )
        shape = () if embedding_layer is None else tuple(seen.features[embedding_layer].shape[1:])
        if shape and len(shape) not in (1, 3):
            raise RecipeError(
                f"layer {embedding_layer!r} of student {network.spec!r} cannot represent a sample "
                f"(shape {shape}): it takes vectors (D,) and maps (C, H, W). Name another with "
                "--set objective.fusion.layer=LAYER, or leave it out for the input of the head"
            )
    module.train(was_training)
    width = 0 if seen.embedding is None else seen.embedding.shape[1]
    return StudentShapes(
        tuple(logits.shape[1:]), width, {name: tuple(seen.features[name].shape[1:]) for name in layers}
    )


def blocks(module: nn.Module) -> list[str]:
    """Return the names of a network's parts, shallow to deep: its children with weights, without the head."""
    parts = [name for name, child in module.named_children() if any(True for _ in child.parameters())]
    return parts[:-1] or parts


def depth_of(module: nn.Module) -> dict[str, int]:
    """Return every submodule's position in the order of the network."""
    return {name: index for index, (name, _) in enumerate(module.named_modules()) if name}
