"""Encodings: representations of float32 values in a store. Raw logits are stored, never probabilities.

float32     exact
float16     within half a unit in the last place; the default
bfloat16    float32's range, 8 bits of precision
int8        one byte per value, affine per row; the compact setting
topk:K      the K largest logits, the label's logit, and the mass of the rest; for many classes
bits        signs only, for features
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coursepack.data.encodings.base import Component as Component
from coursepack.data.encodings.base import Encoding as Encoding
from coursepack.data.encodings.bits import Bits
from coursepack.data.encodings.dense import Dense
from coursepack.data.encodings.int8 import Int8
from coursepack.data.encodings.topk import TopK
from coursepack.errors import RecipeError, UnknownName

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["ENCODINGS", "Component", "Encoding", "encoding_from_dict", "parse_encoding"]

ENCODINGS: dict[str, Callable[..., Encoding]] = {
    "float32": lambda: Dense("float32"),
    "float16": lambda: Dense("float16"),
    "bfloat16": lambda: Dense("bfloat16"),
    "int8": Int8,
    "topk": TopK,
    "bits": Bits,
}
FOR_LOGITS = tuple(name for name in ENCODINGS if name != "bits")
FOR_FEATURES = tuple(name for name in ENCODINGS if name != "topk")


def parse_encoding(text: str, known: tuple[str, ...] = tuple(ENCODINGS)) -> Encoding:
    """Return the encoding that an option names, such as `float16` or `topk:100`.

    Raises:
        UnknownName: `known` has no encoding of that name.
        RecipeError: a parameter is missing, wrong or not accepted.
    """
    name, _, parameter = text.partition(":")
    if name not in known:
        raise UnknownName("encoding", name, known)
    if name == "topk":
        if not parameter.isdecimal():
            raise RecipeError(
                f"encoding {text!r} has no number of entries to keep, expected topk:K such as topk:10"
            )
        return TopK(int(parameter))
    if parameter:
        raise RecipeError(f"encoding {name!r} takes no parameter, got {text!r}")
    return ENCODINGS[name]()


def encoding_from_dict(values: Mapping[str, Any]) -> Encoding:
    """Return the encoding that `to_dict` described.

    Raises:
        UnknownName: there is no encoding of that name.
    """
    parameters = {key: value for key, value in values.items() if key != "name"}
    name = str(values.get("name"))
    if name not in ENCODINGS:
        raise UnknownName("encoding", name, ENCODINGS)
    return ENCODINGS[name](**parameters)


def smaller_encoding(encoding: Encoding, row_shape: tuple[int, ...]) -> Encoding:
    """Return `encoding`, or float16 if a sparse encoding would not be smaller than that."""
    if not isinstance(encoding, TopK):
        return encoding
    dense = Dense("float16")
    fits = row_shape[0] >= encoding.k
    sparse_bytes = (
        sum(component.row_bytes for component in encoding.components(row_shape).values()) if fits else 0
    )
    dense_bytes = sum(component.row_bytes for component in dense.components(row_shape).values())
    return encoding if fits and sparse_bytes < dense_bytes else dense
