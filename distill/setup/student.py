"""Outputs of a student that training reads: logits, watched layers and embedding, and their shapes."""

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
"""Exceptions that networks raise for images of an unsupported size; vision transformers use assertions."""


def wrong_size(network: Network, error: Exception) -> RecipeError:
    """Return the error to raise for a student that raised one of `UNFIT`."""
    size = network.preprocessing.size
    return RecipeError(
        f"student {network.spec!r} cannot take views of {size} x {size} pixels: {error}. Choose another "
        "student_size, or leave it out"
    )


@contextmanager
def watched(
    network: Network, layers: Sequence[str], *, embedding: bool, embedding_layer: str | None = None
) -> Iterator[Callable[[Tensor], StudentOutput]]:
    """Capture outputs of layers, and optionally an embedding, during a forward pass inside the context.

    Args:
        network: the student.
        layers: dotted names of the layers to capture.
        embedding: capture an embedding of each sample.
        embedding_layer: layer, among `layers`, whose maximum over positions is the embedding; None means the
            input of the last linear layer.

    Yields:
        A function that takes the student's logits after the forward pass and returns the student's output.
    """
    head_inputs: list[Tensor] = []
    with ExitStack() as stack:
        captured = stack.enter_context(tapped(network.module, layers, shared=True))
        if embedding and embedding_layer is None:
            handle = _head(network).register_forward_pre_hook(
                lambda _module, inputs: head_inputs.append(inputs[0])
            )
            stack.callback(handle.remove)

        def output(logits: Tensor) -> StudentOutput:
            vectors = head_inputs[-1] if head_inputs else None
            if embedding and embedding_layer is not None:
                features = captured[embedding_layer]
                vectors = features.flatten(2).amax(2) if features.ndim > 2 else features
            return StudentOutput(logits, vectors, captured)

        yield output


def _head(network: Network) -> nn.Linear:
    heads = [module for module in network.module.modules() if isinstance(module, nn.Linear)]
    if not heads or heads[-1].out_features != network.classes:
        raise RecipeError(
            f"student {network.spec!r} does not end in a linear layer of {network.classes} classes: name "
            "the layer that represents a sample with --set objective.fusion.layer=LAYER"
        )
    return heads[-1]


@dataclass(frozen=True)
class StudentShapes:
    """Shapes of a student's output for one sample."""

    logits: tuple[int, ...]
    embedding_width: int
    """Width D of the embedding; 0 if it was not requested."""
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
    """Return the shapes of a student's outputs, from a forward pass on one black image.

    Raises:
        UnknownName: a layer does not exist in the student.
        RecipeError: the student does not support its image size, a layer is not run, or the embedding layer's
            output is neither a vector nor a map.
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
    """Return the names of a network's blocks, shallow to deep: children with parameters, except the head."""
    names = [name for name, child in module.named_children() if any(True for _ in child.parameters())]
    return names[:-1] or names


def depth_of(module: nn.Module) -> dict[str, int]:
    """Return the index of every submodule in the order of definition, by name."""
    return {name: index for index, (name, _) in enumerate(module.named_modules()) if name}


def last_map(network: Network, channels: int) -> str:
    """Return the name of a student's deepest block that gives maps.

    Raises:
        RecipeError: no block gives maps.
    """
    names = blocks(network.module)
    shapes = probe_student(network, channels, names).features if names else {}
    with_maps = [name for name in names if len(shapes[name]) == 3]
    if not with_maps:
        raise RecipeError(
            f"student {network.spec!r} has no block that gives maps (C, H, W), which the exchange reads: "
            "choose a convolutional network, or --method dml, which reads logits alone"
        )
    return with_maps[-1]
