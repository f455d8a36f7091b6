"""Encodings: representations of float32 values in a store. Raw logits are stored, never probabilities.

float32     exact
float16     within half a unit in the last place; the default
bfloat16    float32's range, 8 bits of precision
int8        one byte per value, affine per row; the compact setting
int4        half a byte per class; for logits at high temperatures
topk:K      the K largest logits, the label's logit, and the mass of the rest; for many classes
topk16:K    the same in two to three times the bytes, as stores before `topk` was packed have it
bits        signs only, for features
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from coursepack.data.encodings.base import Component as Component
from coursepack.data.encodings.base import Encoding as Encoding
from coursepack.data.encodings.bits import Bits
from coursepack.data.encodings.dense import Dense
from coursepack.data.encodings.int4 import Int4
from coursepack.data.encodings.int8 import Int8
from coursepack.data.encodings.packed_topk import PackedTopK
from coursepack.data.encodings.topk import TopK
from coursepack.errors import RecipeError, UnknownName

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = [
    "ENCODINGS",
    "Component",
    "Encoding",
    "drops_classes",
    "encoding_from_dict",
    "is_coarse",
    "parse_encoding",
    "row_bytes",
]

ENCODINGS: dict[str, Callable[..., Encoding]] = {
    "float32": lambda: Dense("float32"),
    "float16": lambda: Dense("float16"),
    "bfloat16": lambda: Dense("bfloat16"),
    "int8": Int8,
    "int4": Int4,
    "topk": TopK,
    "packed_topk": PackedTopK,
    "bits": Bits,
}
"""Encodings by their name in a store's manifest."""
SPARSE: dict[str, Callable[..., Encoding]] = {"topk": PackedTopK, "topk16": TopK}
"""Sparse encodings by their name in an option, which differs from that in a manifest."""
_STORED_ONLY, _LOGITS_ONLY = ("packed_topk",), ("int4", *SPARSE)
NAMES = (*(name for name in ENCODINGS if name not in _STORED_ONLY), "topk16")
FOR_LOGITS = tuple(name for name in NAMES if name != "bits")
FOR_FEATURES = tuple(name for name in NAMES if name not in _LOGITS_ONLY)


def parse_encoding(text: str, known: tuple[str, ...] = NAMES) -> Encoding:
    """Return the encoding that an option names, such as `float16`, `topk:100` or `topk:100,label=no`.

    Raises:
        UnknownName: `known` has no encoding of that name.
        RecipeError: a parameter is missing, wrong or not accepted.
    """
    name, _, parameter = text.partition(":")
    if name not in known:
        raise UnknownName("encoding", name, known)
    if name in SPARSE:
        return _sparse(text, name, parameter)
    if parameter:
        raise RecipeError(f"encoding {name!r} takes no parameter, got {text!r}")
    return ENCODINGS[name]()


def _sparse(text: str, name: str, parameter: str) -> Encoding:
    number, comma, option = parameter.partition(",")
    if not re.fullmatch("[0-9]{1,9}", number):
        raise RecipeError(
            f"encoding {text!r} has no number of entries to keep, expected {name}:K such as {name}:10"
        )
    if not comma:
        return SPARSE[name](int(number))
    if name != "topk" or option not in ("label=yes", "label=no"):
        forms = "topk:K or topk:K,label=no" if name == "topk" else f"{name}:K"
        raise RecipeError(f"encoding {text!r} has the unknown option {option!r}, expected {forms}")
    return PackedTopK(int(number), label=option == "label=yes")


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


def drops_classes(encoding: Encoding) -> bool:
    """Return True if an encoding keeps some of the logits only."""
    return isinstance(encoding, (TopK, PackedTopK))


def is_coarse(encoding: Encoding) -> bool:
    """Return True if an encoding may lose too much of the logits at some temperatures."""
    return drops_classes(encoding) or isinstance(encoding, Int4)


def row_bytes(encoding: Encoding, row_shape: tuple[int, ...]) -> int:
    """Return the size of one encoded row."""
    return sum(component.row_bytes for component in encoding.components(row_shape).values())


def smaller_encoding(encoding: Encoding, row_shape: tuple[int, ...]) -> Encoding:
    """Return `encoding`, or a dense one if a sparse encoding would not be smaller than that.

    That is int8, which loses less than any sparse encoding of its size, and float16 for `topk16`.
    """
    if not isinstance(encoding, (TopK, PackedTopK)):
        return encoding
    dense: Encoding = Dense("float16") if isinstance(encoding, TopK) else Int8()
    fits = row_shape[0] >= encoding.k and row_bytes(encoding, row_shape) < row_bytes(dense, row_shape)
    return encoding if fits else dense
