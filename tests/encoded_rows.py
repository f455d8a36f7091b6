"""Stores of random rows in any encodings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from helpers import RowStore

from coursepack.data.encodings import parse_encoding

if TYPE_CHECKING:
    from coursepack.data.store import StorePlan

EVERY_ENCODING = ("float32", "float16", "bfloat16", "int8", "int4", "topk:3", "topk16:3", "bits")


@dataclass(frozen=True)
class EncodedRows(RowStore):
    """A `RowStore` whose arrays have an encoding each, and which may keep static tables."""

    encodings: dict[str, str] = field(default_factory=lambda: {"logits": "float32"})
    static: dict[str, np.ndarray] = field(default_factory=dict)

    def plan(self, **changes: Any) -> StorePlan:
        """The plan of such a store."""
        arrays = {name: (self.encoding_of(name), shape) for name, shape in self.shapes.items()}
        return super().plan(**{"arrays": arrays, "static": self.static} | changes)

    def encoding_of(self, array: str) -> Any:
        """The encoding of one array."""
        return parse_encoding(self.encodings.get(array, self.encoding))

    def parts(self, array: str, view: int) -> dict[str, np.ndarray]:
        """What is stored of one array and view: all rows of every component."""
        rows = np.arange(self.samples)
        return self.encoding_of(array).encode(self.values(array, view), rows, self.labels)


def encoded_as(encoding: str, **facts: Any) -> EncodedRows:
    """Logits in that encoding, or features where it is not for logits."""
    if encoding == "bits":
        shapes, encodings = {"logits": (10,), "features/a": (3, 7)}, {"features/a": "bits"}
        return EncodedRows(**{"shapes": shapes, "encodings": encodings, **facts})
    return EncodedRows(**{"encodings": {"logits": encoding}, **facts})
