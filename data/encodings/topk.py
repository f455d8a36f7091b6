"""Encoding of the k largest logits, the label's logit, and the mass of the others at several temperatures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coursepack.data.encodings.base import Component, check_range, tensor_of, within
from coursepack.errors import RecipeError
from coursepack.kernels import TopKRows
from coursepack.kernels.rows import TAIL_TEMPERATURES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from coursepack.data.randomness import Samples

_LIMIT = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class TopK:
    """Sparse encoding with float16 logits and whole class ids, which stores before `PackedTopK` have.

    It loses the shape of the tail: measure the effect before use (`precompute inspect`).
    """

    k: int

    def __post_init__(self) -> None:
        check_topk("topk16", self.k)

    @property
    def name(self) -> str:
        """`topk16:K`."""
        return f"topk16:{self.k}"

    @property
    def exact(self) -> bool:
        """True if decoding returns the original values: always False."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that describe the encoding."""
        return {"name": "topk", "k": self.k}

    def components(self, row_shape: tuple[int, ...]) -> dict[str, Component]:
        """Return `ids`, `values` and `tail`.

        Raises:
            RecipeError: the rows are not logits, or have fewer than k classes.
        """
        check_topk(self.name, self.k, row_shape)
        ids = "uint16" if row_shape[0] <= 1 << 16 else "uint32"
        return {
            "ids": Component(ids, (self.k,)),
            "values": Component("float16", (self.k,)),
            "tail": Component("float16", (len(TAIL_TEMPERATURES),)),
        }

    def encode(
        self, values: NDArray[np.float32], samples: Samples, labels: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        """Keep the k largest logits; if the label is not among them, it replaces the smallest."""
        lost = np.abs(values) > _LIMIT
        check_range(values, lost, samples, self.name, _LIMIT)
        logits = tensor_of(values)
        ids = kept_classes(logits, self.k, labels)
        dtype = self.components(values.shape[1:])["ids"].dtype
        return {
            "ids": ids.numpy().astype(dtype),
            "values": logits.gather(1, ids).numpy().astype(np.float16),
            "tail": log_masses(logits, ids, TAIL_TEMPERATURES).numpy().astype(np.float16),
        }

    def agrees(
        self, values: NDArray[np.float32], stored: Mapping[str, NDArray[Any]], slack: float
    ) -> NDArray[np.bool_]:
        """Return True for rows that a new encoding would give, up to rounding.

        Kept logits are within half a float16 unit, none is smaller than those a new encoding keeps, and the
        mass of the others agrees.
        """
        ids = stored["ids"].astype(np.int64)
        valid: NDArray[np.bool_] = (ids < values.shape[1]).all(1)
        ids = np.minimum(ids, values.shape[1] - 1)
        kept = np.take_along_axis(values, ids, axis=1)
        tolerance = slack * np.abs(values).max(1, keepdims=True)
        rounded = 2.0**-11 * np.abs(kept) + 2.0**-25
        close = within(stored["values"].astype(np.float32), kept, rounded + tolerance, 0)
        # The last entry may be the label's; all others must be among the k largest.
        least = -np.sort(-values, axis=1)[:, self.k - 1]
        second_lowest = np.sort(kept, axis=1)[:, 1]
        chosen: NDArray[np.bool_] = second_lowest >= least - 2 * tolerance[:, 0]
        distinct: NDArray[np.bool_] = np.all(np.diff(np.sort(ids, axis=1), axis=1) > 0, axis=1)
        logits = tensor_of(values)
        masses = log_masses(logits, torch.from_numpy(ids), TAIL_TEMPERATURES).numpy()
        # The mass changes with the dropped logits and with the row's maximum.
        bound = 2.0**-11 * np.abs(masses) + 2.0**-25 + 2 * tolerance
        same_mass: NDArray[np.bool_] = np.all(np.abs(stored["tail"] - masses) <= bound, axis=1)
        return valid & close & chosen & distinct & same_mass

    def rows(self, components: Mapping[str, torch.Tensor], row_shape: tuple[int, ...]) -> TopKRows:
        """Wrap the stored ids, logits and tail.

        Raises:
            ValueError: an id is not a class. Ids are checked here, on the CPU, because a check on a GPU would
                synchronize.
        """
        ids = components["ids"].numpy()
        if ids.max(initial=0) >= row_shape[0]:
            raise ValueError(f"ids holds {ids.max()}, expected class ids 0..{row_shape[0] - 1}")
        return TopKRows(components["ids"], components["values"], components["tail"], row_shape[0])


def check_topk(name: str, k: int, row_shape: tuple[int, ...] | None = None) -> None:
    """Check the number of entries of a sparse encoding, and the rows that it is for.

    Raises:
        RecipeError: the number is not whole or too small, or the rows are not logits of at least k classes.
    """
    if type(k) is not int:
        raise RecipeError(f"encoding {name} keeps {k!r:.40} entries, expected a whole number")
    if k < 2:
        raise RecipeError(
            f"encoding {name} keeps {k} entries, expected at least 2: the top class and the label"
        )
    if row_shape is not None and (len(row_shape) != 1 or row_shape[0] < k):
        raise RecipeError(f"encoding {name} is for logits of at least {k} classes, got rows {row_shape}")


def kept_classes(logits: torch.Tensor, k: int, labels: NDArray[np.int64] | None) -> torch.Tensor:
    """Return the classes of the k largest logits `(N, k)`, largest first.

    A label that is not among them replaces the last; None means that labels are not kept.
    """
    ids = logits.topk(k, dim=1).indices
    if labels is not None:
        label = torch.from_numpy(labels)[:, None]
        absent = ~(ids == label).any(1)
        ids[absent, -1] = label[absent, 0]
    return ids


def log_masses(logits: torch.Tensor, ids: torch.Tensor, temperatures: Sequence[float]) -> torch.Tensor:
    """Return the log of `sum exp((z - max z) / T)` over the classes that are not kept, `(N, J)` float64."""
    dropped = logits.scatter(1, ids, float("-inf")).double() - logits.amax(1, keepdim=True)
    masses = torch.stack([torch.logsumexp(dropped / t, dim=1) for t in temperatures], dim=1)
    # Clamped for rows with no mass left, so that float16 holds a finite value.
    return masses.clamp(-_LIMIT, _LIMIT)
