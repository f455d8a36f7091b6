"""Weights in a safetensors file, with the card in its metadata and, for people, in a JSON file beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safetensors.torch import save

from coursepack.canonical import canonical_json
from coursepack.files import write_whole
from coursepack.models.load import load_teacher

if TYPE_CHECKING:
    from pathlib import Path

    from coursepack.models.build import Network
    from coursepack.models.card import Card


def check(network: Network) -> None:
    """Do nothing: every network has weights."""


def write(network: Network, card: Card, path: Path) -> None:
    """Write the weights, and the card in a file of the same name with the suffix `.json`."""
    state = {name: value.detach().cpu().contiguous() for name, value in network.module.state_dict().items()}
    write_whole(path, save(state, {"format": "pt", **card.metadata()}))
    write_whole(path.with_suffix(".json"), canonical_json(card.values(), indent=1).encode())


def reload(path: Path, card: Card) -> Network:
    """Load the weights into a network of the same spec, with the preprocessing in the metadata."""
    return load_teacher(card.network, card.class_names, weights=str(path))
