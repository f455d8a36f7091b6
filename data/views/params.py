"""Drawn parameters of views: integers on a grid of 2**-16, equal on every platform."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import google_crc32c
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from coursepack.data.randomness import Samples

GRID = 1 << 16
"""Resolution of coordinates and of all other continuous parameters: integers in units of 1 / GRID."""

MIRRORED, UPSIDE_DOWN = 1, 2
"""Bits of `flips`: left-right and top-bottom flip, applied after the crop."""

NO_MIX, MIXUP, CUTMIX = 0, 1, 2


@dataclass(frozen=True)
class Mixing:
    """Parameters of mixing each image with a partner image."""

    kinds: NDArray[np.uint8]
    """`(N,)`: `NO_MIX`, `MIXUP` or `CUTMIX`."""
    partners: Samples
    """Partners `(N,)`, samples of the whole split; the sample itself if it is not mixed."""
    shares: NDArray[np.int32]
    """Share `(N,)` of the first image in 2**-16: weight of its label and, in mixup, of its pixels."""
    boxes: NDArray[np.int32]
    """Box `(N, 4)` that cutmix fills: top, left, height, width in 2**-16 of the rendered side."""
    params: ViewParams
    """View parameters of the partners, which are not mixed themselves."""

    def _arrays(self) -> Iterator[NDArray[np.generic]]:
        yield from (self.kinds, self.partners.astype("<i8"), self.shares, self.boxes)
        yield from self.params._arrays()

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Mixing:
        return Mixing(
            self.kinds[rows], self.partners[rows], self.shares[rows], self.boxes[rows], self.params[rows]
        )


@dataclass(frozen=True)
class ViewParams:
    """Drawn parameters of views, one row per (sample, view)."""

    boxes: NDArray[np.int32]
    """Crop box `(N, 4)`: top, left, height, width, in 2**-16 of the image's sides. Outside is black."""
    flips: NDArray[np.uint8] | None = None
    """`(N,)` bits `MIRRORED` and `UPSIDE_DOWN`; None if no op flips."""
    pixel_ops: tuple[NDArray[np.int32], ...] = ()
    """Parameters `(N, P)` of each op on rendered pixels."""
    mixing: Mixing | None = None
    """Parameters of mixing; None if the recipe does not mix."""

    def digest(self) -> str:
        """Return the crc32c of all parameters, as 8 hexadecimal digits."""
        checksum = 0
        for array in self._arrays():
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            checksum = google_crc32c.extend(checksum, little.tobytes())
        return f"{checksum:08x}"

    def _arrays(self) -> Iterator[NDArray[np.generic]]:
        yield self.boxes
        if self.flips is not None:
            yield self.flips
        yield from self.pixel_ops
        if self.mixing is not None:
            yield from self.mixing._arrays()

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> ViewParams:
        """Return the parameters of the selected rows."""
        return ViewParams(
            self.boxes[rows],
            None if self.flips is None else self.flips[rows],
            tuple(array[rows] for array in self.pixel_ops),
            None if self.mixing is None else self.mixing[rows],
        )

    def __len__(self) -> int:
        return len(self.boxes)


def concatenate(parts: Sequence[ViewParams]) -> ViewParams:
    """Concatenate the rows of view parameters drawn from one recipe."""
    first = parts[0]
    if len(parts) == 1:
        return first
    mixed = [part.mixing for part in parts if part.mixing is not None]
    flips = [part.flips for part in parts if part.flips is not None]
    return ViewParams(
        np.concatenate([part.boxes for part in parts]),
        np.concatenate(flips) if flips else None,
        tuple(np.concatenate(columns) for columns in zip(*(part.pixel_ops for part in parts), strict=True)),
        _concatenate_mixing(mixed) if mixed else None,
    )


def _concatenate_mixing(parts: Sequence[Mixing]) -> Mixing:
    return Mixing(
        np.concatenate([part.kinds for part in parts]),
        np.concatenate([part.partners for part in parts]),
        np.concatenate([part.shares for part in parts]),
        np.concatenate([part.boxes for part in parts]),
        concatenate([part.params for part in parts]),
    )
