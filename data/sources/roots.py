"""Where a data set comes from and how it lies on disk: what errors about a missing root say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coursepack.errors import RecipeError, SourceError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from coursepack.data.sources.base import Spec

MOST_NAMES = 8
"""Names that an error lists before it only counts."""


@dataclass(frozen=True)
class Layout:
    """What a user has to put under --root."""

    contents: str
    """What the folder holds, for people to read."""
    download: str
    """Where it comes from, as a sentence; empty for a user's own files."""

    def root(self, spec: Spec, root: Path | None) -> Path:
        """The folder that was given, absolute.

        Raises:
            RecipeError: none was given.
            SourceError: it is not there.
        """
        if root is None:
            raise RecipeError(
                f"source '{spec}' reads files: give --root, a folder that holds {self.contents}"
            )
        folder = Path(root).expanduser().absolute()
        if not folder.is_dir():
            found = "it is a file" if folder.exists() else "there is no such folder"
            raise self.error(spec, folder, found)
        return folder

    def error(self, spec: Spec, root: Path, problem: str) -> SourceError:
        """An error that says what is wrong, what was expected and what to do."""
        advice = f" {self.download}" if self.download else ""
        return SourceError(
            f"source '{spec}' cannot be read from --root {str(root)!r}: {problem}. Expected there: "
            f"{self.contents}.{advice}"
        )


def found_in(folder: Path) -> str:
    """What a folder holds, for an error."""
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    return f"found {some(names)}" if names else "the folder is empty"


def some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
