"""What every encoding has to do: a new one is tested by being listed in `ENCODINGS`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coursepack.data.encodings import ENCODINGS, encoding_from_dict
from coursepack.kernels import Rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROW_SHAPES = [(1,), (10,), (1000,), (4, 3), (2, 3, 4, 5)]
"""Logits and features, narrow and wide."""


def float16_ulp(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """The unit in the last place of float16 at each value, 2**-24 where it is subnormal."""
    exponent = np.frexp(np.abs(values.astype(np.float64)))[1] - 1
    return 2.0 ** (np.maximum(exponent, -14) - 10)


ERROR_BOUNDS: dict[str, Any] = {
    "float32": lambda values: np.zeros(values.shape),
    "float16": lambda values: float16_ulp(values) / 2,
}
"""Largest |decoded - value| per value; written from the definition of each format."""


def roundtrip(name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Values encoded, gathered as a reader would, and decoded."""
    encoding = ENCODINGS[name]()
    stored = encoding.encode(values, np.arange(len(values)))
    rows = encoding.rows({part: torch.from_numpy(array) for part, array in stored.items()})
    assert isinstance(rows, Rows)
    assert rows.shape == values.shape
    return rows.decode().numpy()


def check_description(name: str) -> None:
    """`to_dict` is plain JSON that gives an equal, hashable object back."""
    encoding = ENCODINGS[name]()
    values = json.loads(json.dumps(encoding.to_dict()))
    assert encoding.name == values["name"] == name
    assert encoding_from_dict(values) == encoding
    assert len({encoding, encoding_from_dict(values)}) == 1


def check_components(name: str, row_shape: tuple[int, ...]) -> None:
    """What `components` promises is what `encode` gives, for any number of rows."""
    encoding = ENCODINGS[name]()
    promised = encoding.components(row_shape)
    for count in (0, 1, 5):
        values = np.random.default_rng(count).normal(0, 5, (count, *row_shape)).astype(np.float32)
        kept = values.copy()
        stored = encoding.encode(values, np.arange(count))
        assert stored.keys() == promised.keys()
        for part, component in promised.items():
            assert stored[part].dtype == np.dtype(component.dtype)
            assert stored[part].shape == (count, *component.row_shape)
            assert stored[part].nbytes == count * component.row_bytes
        assert np.array_equal(values, kept)


def check_error_bound(name: str, values: NDArray[np.float32]) -> None:
    """Every decoded value lies within the bound of its format."""
    decoded = roundtrip(name, values)
    assert decoded.dtype == np.float32
    error = np.abs(decoded.astype(np.float64) - values)
    assert (error <= ERROR_BOUNDS[name](values)).all()
