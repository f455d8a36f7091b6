"""Interface of an export format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from coursepack.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from coursepack.models.build import Network
    from coursepack.models.card import Card


@dataclass(frozen=True)
class Format:
    """A file format, or a folder of files, that holds a trained network."""

    suffix: str
    """Suffix of the file's name; empty for a folder."""
    check: Callable[[Network], None]
    """Checks that the format can hold a network and that its libraries are installed."""
    write: Callable[[Network, Card, Path], None]
    """Writes a network to a file that does not exist, or into an empty folder."""
    reload: Callable[[Path, Card], Network]
    """Loads what `write` wrote, as a teacher."""


def missing_extra(name: str, library: str, error: ImportError) -> RecipeError:
    """Return the error for a format whose library cannot be imported."""
    return RecipeError(
        f"--format {name} needs {library}, which cannot be imported: {error}. "
        "Get it with `pip install 'coursepack[export]'`"
    )
