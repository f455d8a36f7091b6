"""Code of the user's own, named in a recipe or a flag as `module:name`."""

from __future__ import annotations

import importlib
from typing import Any

from coursepack.errors import RecipeError


def own_object(module_name: str, path: str, said: str) -> Any:
    """What a module holds under a name, which may have dots.

    Args:
        module_name: as in an import.
        path: the name.
        said: whose it is, for the error's text: `network 'python:mine:make'`.

    Raises:
        RecipeError: the module cannot be imported, or has no such name.
    """
    try:
        found: Any = importlib.import_module(module_name)
        for part in path.split("."):
            found = getattr(found, part)
    except ImportError as error:
        raise RecipeError(
            f"{said}: cannot import {module_name!r}: {error}. Modules are looked for where Python looks; "
            "PYTHONPATH adds folders"
        ) from error
    except AttributeError as error:
        raise RecipeError(f"{said}: module {module_name!r} has no {path!r}") from error
    return found
