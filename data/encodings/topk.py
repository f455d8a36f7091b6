"""The k largest logits of a row, the label's, and the mass of all others at a few temperatures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coursepack.data.encodings.base import Component, check_range, within
from coursepack.errors import RecipeError
from coursepack.kernels import TopKRows
from coursepack.kernels.rows import TAIL_TEMPERATURES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from coursepack.data.randomness import Samples

_LIMIT = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class TopK:
    """For many classes. Lossy in the shape of the tail: measure before use (`precompute inspect`)."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 2:
            raise RecipeError(
                f"encoding topk keeps {self.k} entries, expected at least 2: the top class and the label"
            )

    @property
    def name(self) -> str:
        """`topk:K`."""
        return f"topk:{self.k}"

    @property
    def exact(self) -> bool:
        """Whether values come back as they were."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"name": "topk", "k": self.k}

    def components(self, row_shape: tuple[int, ...]) -> dict[str, Component]:
        """`ids`, `values` and `tail`.

        Raises:
            RecipeError: rows that are not logits, or have fewer than k classes.
        """
        if len(row_shape) != 1 or row_shape[0] < self.k:
            raise RecipeError(
                f"encoding {self.name} is for logits of at least {self.k} classes, got rows {row_shape}"
            )
        ids = "uint16" if row_shape[0] <= 1 << 16 else "uint32"
        return {
            "ids": Component(ids, (self.k,)),
            "values": Component("float16", (self.k,)),
            "tail": Component("float16", (len(TAIL_TEMPERATURES),)),
        }

    def encode(
        self, values: NDArray[np.float32], samples: Samples, labels: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        """Keep the k largest logits; where the label is not among them it takes the place of the last."""
        lost = np.abs(values) > _LIMIT
        check_range(values, lost, samples, self.name, _LIMIT)
        logits = torch.from_numpy(np.ascontiguousarray(values))
        label = torch.from_numpy(labels)[:, None]
        kept, ids = logits.topk(self.k, dim=1)
        absent = ~(ids == label).any(1)
        ids[absent, -1] = label[absent, 0]
        kept[absent, -1] = logits.gather(1, label)[absent, 0]
        dtype = self.components(values.shape[1:])["ids"].dtype
        return {
            "ids": ids.numpy().astype(dtype),
            "values": kept.numpy().astype(np.float16),
            "tail": _log_masses(logits, ids).numpy().astype(np.float16),
        }

    def agrees(
        self, values: NDArray[np.float32], stored: Mapping[str, NDArray[Any]], slack: float
    ) -> NDArray[np.bool_]:
        """Kept logits within half a float16 unit, none below what a fresh choice keeps; and the mass."""
        ids = stored["ids"].astype(np.int64)
        inside: NDArray[np.bool_] = (ids < values.shape[1]).all(1)
        ids = np.minimum(ids, values.shape[1] - 1)
        kept = np.take_along_axis(values, ids, axis=1)
        moved = slack * np.abs(values).max(1, keepdims=True)
        rounded = 2.0**-11 * np.abs(kept) + 2.0**-25
        close = within(stored["values"].astype(np.float32), kept, rounded + moved, 0)
        # The last entry may be the label's; every other one has to be among the k largest.
        least = -np.sort(-values, axis=1)[:, self.k - 1]
        second_lowest = np.sort(kept, axis=1)[:, 1]
        chosen: NDArray[np.bool_] = second_lowest >= least - 2 * moved[:, 0]
        once: NDArray[np.bool_] = np.all(np.diff(np.sort(ids, axis=1), axis=1) > 0, axis=1)
        masses = _log_masses(torch.from_numpy(np.ascontiguousarray(values)), torch.from_numpy(ids)).numpy()
        # A mass moves with the dropped logits and with the row's maximum.
        bound = 2.0**-11 * np.abs(masses) + 2.0**-25 + 2 * moved
        same: NDArray[np.bool_] = np.all(np.abs(stored["tail"] - masses) <= bound, axis=1)
        return inside & close & chosen & once & same

    def rows(self, components: Mapping[str, torch.Tensor], row_shape: tuple[int, ...]) -> TopKRows:
        """Ids, logits and tail as they are stored.

        Raises:
            ValueError: an id that is no class. It is looked for here, on the CPU, as a GPU would have to be
                waited for.
        """
        ids = components["ids"].numpy()
        if ids.max(initial=0) >= row_shape[0]:
            raise ValueError(f"ids holds {ids.max()}, expected class ids 0..{row_shape[0] - 1}")
        return TopKRows(components["ids"], components["values"], components["tail"], row_shape[0])


def _log_masses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log of `sum exp((z - max z) / T)` over the classes that are not kept, `(N, 4)` float64."""
    dropped = logits.scatter(1, ids, float("-inf")).double() - logits.amax(1, keepdim=True)
    masses = torch.stack([torch.logsumexp(dropped / t, dim=1) for t in TAIL_TEMPERATURES], dim=1)
    # Nothing was dropped, or nothing that can be seen: a mass that float16 still holds, and never NaN.
    return masses.clamp(-_LIMIT, _LIMIT)
