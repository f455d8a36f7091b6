"""Card of an exported network: the pixels it expects, its classes and its training, as plain values.

A card travels in the file of the network, as metadata whose values are texts, so that whoever gets the file
needs nothing else to use it. The values of a foreign file are validated when they are read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from coursepack.canonical import canonical_json
from coursepack.errors import TeacherMismatch
from coursepack.models.preprocessing import Preprocessing

if TYPE_CHECKING:
    from collections.abc import Mapping

MARK = "coursepack"
"""Key whose value is the version that exported the network; files without it have no card."""


@dataclass(frozen=True)
class Card:
    """Description that an exported network carries."""

    network: str
    """Spec of the architecture."""
    class_names: tuple[str, ...]
    """Names of the classes, in the order of the logits."""
    preprocessing: Preprocessing
    crop: float = 1.0
    """Side of the center crop that it was evaluated on, as a share of the image's shorter side."""
    trained: dict[str, Any] = field(default_factory=dict)
    """Method, weights and accuracy of the run that trained the network."""

    def values(self) -> dict[str, Any]:
        """Return the card as plain values.

        >>> card = Card("tiny", ("ant", "bee"), Preprocessing(size=8, mean=(0.5,), std=(0.25,)))
        >>> card.values()["input"]
        'images (N, 1, 8, 8) float32: (pixel / 255 - mean) / std per channel'
        """
        pixels = self.preprocessing
        shape = f"(N, {pixels.channels}, {pixels.size}, {pixels.size})"
        return {
            MARK: version("coursepack"),
            "network": self.network,
            "input": f"images {shape} float32: (pixel / 255 - mean) / std per channel",
            "output": f"logits (N, {len(self.class_names)}) float32",
            "preprocessing": pixels.model_dump(mode="json"),
            "crop": self.crop,
            "class_names": list(self.class_names),
            "trained": self.trained,
        }

    def metadata(self) -> dict[str, str]:
        """Return the card as texts; mappings and lists are JSON."""
        return {
            name: value if isinstance(value, str) else canonical_json(value)
            for name, value in self.values().items()
        }


def read_card(metadata: Mapping[str, str], where: str) -> tuple[Preprocessing, tuple[str, ...]] | None:
    """Return preprocessing and class names from a file's metadata, or None if it has no card.

    Args:
        metadata: texts by name.
        where: name of the file for error messages.

    Raises:
        TeacherMismatch: the card is damaged.
    """
    if MARK not in metadata:
        return None
    try:
        names = json.loads(metadata["class_names"])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("class_names is no list of texts")
        preprocessing = Preprocessing.model_validate_json(metadata["preprocessing"])
    except (KeyError, ValueError, RecursionError, ValidationError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise TeacherMismatch(
            f"{where} has a damaged card ({type(error).__name__}: {reason}), which `distill export` wrote as "
            "metadata: export the network again"
        ) from error
    return preprocessing, tuple(names)
