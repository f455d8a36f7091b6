"""Contents of objects in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from io import BufferedReader

    from numpy.typing import NDArray

    from coursepack.data.store.locations.base import PieceCheck

PIECE_BYTES = 1 << 20
"""Size of the pieces that are checked during a read, while they are in the CPU's caches."""


class Resident:
    """An object's content in memory, unaffected by later changes of the object."""

    def __init__(self, content: NDArray[np.uint8]) -> None:
        self.content = content

    def size(self) -> int:
        """Return the size of the content in bytes."""
        return len(self.content)

    def is_touched(self) -> bool:
        """Return False, since the content is a copy."""
        return False

    def advise(self, start: int, length: int) -> None:
        """Do nothing, since the content is already in memory."""


def read_whole(file: BufferedReader, size: int, check: PieceCheck | None = None) -> NDArray[np.uint8]:
    """Read a file into memory; the result is shorter than `size` if the file is.

    Args:
        file: the file, at its start.
        size: size of the file in bytes.
        check: check of its pieces, called after the read of each.
    """
    content = np.empty(size, dtype=np.uint8)
    if check is None:
        return content[: file.readinto(content.data)]
    piece = max(1, PIECE_BYTES // check.step) * check.step
    for start in range(0, size, piece):
        count = file.readinto(content[start : start + piece].data)
        check.check(content, start, start + count)
    return content[: file.tell()]
