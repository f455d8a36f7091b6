"""ONNX file of a network, with a free number of images and the card in its metadata properties.

The normalization is in the metadata and not in the graph, so that `onnx:FILE` gives a network the same pixels
as `run:FOLDER` does.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from coursepack.errors import RecipeError, first_line
from coursepack.files import write_whole
from coursepack.models.export.base import missing_extra
from coursepack.models.hubs.onnx import LOGITS
from coursepack.models.load import load_teacher

if TYPE_CHECKING:
    from pathlib import Path

    from coursepack.models.build import Network
    from coursepack.models.card import Card

IMAGES = "images"
"""Name of the input."""
MAX_BYTES = 2_000_000_000
"""Most bytes of weights in one file; a protocol buffer has fewer than 2 GiB."""


def check(network: Network) -> None:
    """Check that the libraries are installed, and that the weights fit into one file.

    Raises:
        RecipeError: they are not, or do not.
    """
    try:
        import onnx  # noqa: F401 - only to see whether they are installed
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise missing_extra("onnx", "onnx, onnxruntime and onnxscript", error) from error
    size = sum(value.nbytes for value in network.module.state_dict().values())
    if size > MAX_BYTES:
        raise RecipeError(
            f"network {network.spec!r} has {size:,} bytes of weights, but one ONNX file holds at most "
            f"{MAX_BYTES:,}: use --format safetensors"
        )


def write(network: Network, card: Card, path: Path) -> None:
    """Export a network in evaluation mode.

    Raises:
        RecipeError: torch cannot export the network.
    """
    pixels = card.preprocessing
    images = torch.zeros(2, pixels.channels, pixels.size, pixels.size)
    was_training = network.module.training
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own
            program: Any = torch.onnx.export(
                network.module.eval(),
                (images,),
                dynamo=True,
                verbose=False,
                input_names=[IMAGES],
                output_names=[LOGITS],
                dynamic_shapes=({0: "batch"},),
            )
    except Exception as error:  # errors of the exporter have many classes
        raise RecipeError(
            f"torch.onnx.export cannot export network {network.spec!r}: {first_line(error)}. Use --format "
            "safetensors, or hf for networks of timm"
        ) from error
    finally:
        network.module.train(was_training)
    model: Any = program.model_proto
    _forget_sources(model)
    for name, value in card.metadata().items():
        model.metadata_props.add(key=name, value=value)
    write_whole(path, model.SerializeToString(deterministic=True))


def _forget_sources(model: Any) -> None:
    """Remove what the exporter notes of the code of every node, such as the paths of its files."""
    for graph in (model.graph, *model.functions):
        for part in (
            graph.node,
            graph.value_info,
            *((graph.input, graph.output) if graph is model.graph else ()),
        ):
            for each in part:
                each.ClearField("metadata_props")
        for node in graph.node:
            node.ClearField("doc_string")


def reload(path: Path, card: Card) -> Network:
    """Load the file as a teacher."""
    return load_teacher(f"onnx:{path}", card.class_names)
