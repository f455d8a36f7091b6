"""Expected layouts of data sets on disk, and the errors raised if a root does not match."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coursepack.errors import RecipeError, SourceError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from coursepack.data.sources.base import Spec

MAX_NAMES = 8
"""Maximum number of names that an error lists; the rest are counted."""


@dataclass(frozen=True)
class Layout:
    """Files that a source expects under --root."""

    contents: str
    """Description of the expected files, for error messages."""
    download: str
    """Download instructions as a sentence; empty for a user's own files."""

    def root(self, spec: Spec, root: Path | None) -> Path:
        """Return the given root as an absolute path.

        Raises:
            RecipeError: no root was given.
            SourceError: the root is not a folder.
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
        """Return an error with the problem, the expected files and where to get them."""
        advice = f" {self.download}" if self.download else ""
        return SourceError(
            f"source '{spec}' cannot be read from --root {str(root)!r}: {problem}. Expected there: "
            f"{self.contents}.{advice}"
        )


def found_in(folder: Path) -> str:
    """Describe the content of a folder, for an error message."""
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    return f"found {summarize_names(names)}" if names else "the folder is empty"


def summarize_names(names: Iterable[str]) -> str:
    """Join the first names with commas and append the number of the remaining ones."""
    names = list(names)
    more = f" and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
