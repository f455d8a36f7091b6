"""Code of the user's own, named in a recipe or a flag as `module:name`.

Such code is run because the user names it. A store's manifest and a run's folder may have been made by
somebody else, so what they name passes `check_trusted` before anything else sees it.
"""

from __future__ import annotations

import importlib
from typing import Any

from coursepack.errors import RecipeError, UntrustedCode

KIND = "python"
"""What specs of networks and sources of one's own begin with: `python:module:name`."""


def check_trusted(spec: str, holder: str, *, trust_code: bool) -> str:
    """Return a spec that a file names, unless it would run code of somebody's own that is not trusted.

    Args:
        spec: of a network or a source, `python:module:name` where it is code.
        holder: the file's owner, for the error's text: `store 'cnn.zarr'`.
        trust_code: whether the user trusts the code that files name.

    Raises:
        UntrustedCode: it would.
    """
    kind, _, path = spec.partition(":")
    if kind == KIND and not trust_code:
        raise UntrustedCode(
            f"{holder} names Python code that would be imported and run: {spec!r}, from module "
            f"{path.partition(':')[0]!r}. Nothing was imported. Code that a store or a run's folder names is "
            "run only with --trust-code (trust_code=True in Python); a source or a view can also be named in "
            "the command or the recipe."
        )
    return spec


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
