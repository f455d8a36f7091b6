"""Problems that a page lists instead of failing."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coursepack.errors import CoursepackError

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class Problems:
    """Defects that were found, and what was left out of a page, with the reason."""

    texts: list[str] = field(default_factory=list)

    def add(self, text: object) -> None:
        """Add a problem, unless it is known."""
        if str(text) not in self.texts:
            self.texts.append(str(text))

    @contextmanager
    def instead_of(self, part: str) -> Iterator[None]:
        """Catch an error of this package or of the system in a part of the page, and add it as a problem."""
        try:
            yield
        except (CoursepackError, OSError) as error:
            self.add(f"{part} left out: {error}")
