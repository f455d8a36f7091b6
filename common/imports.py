"""Python objects that a recipe, an option or a file names as `module:name`.

Importing a module runs its code. Code that the user names in a command or a recipe is run. A store's manifest
and a run folder may come from somebody else, so the names in them are passed to `check_trusted` first.
"""

from __future__ import annotations

import importlib
from typing import Any

from coursepack.errors import RecipeError, UntrustedCode, suggestion

KIND = "python"
"""Prefix of the specs of the user's own networks, sources and views: `python:module:name`."""
PROJECTED = "projected"
"""Prefix of the specs of networks that wrap another network, `projected:NETWORK:...`."""


def names_code(spec: str) -> bool:
    """Return true if a spec names Python code, itself or in the network that it wraps.

    >>> names_code("projected:python:mine:make:layer=body,map=8x4x4,width=8,features=16")
    True
    """
    return spec.removeprefix(f"{PROJECTED}:").partition(":")[0] == KIND


def check_trusted(spec: str, holder: str, *, trust_code: bool) -> str:
    """Return a spec that a file names, or refuse it if it names Python code that is not trusted.

    Args:
        spec: spec of a network, a source or a view; `python:module:name` if it names code.
        holder: name of the store or run that the spec comes from, for the error message: `store 'cnn.zarr'`.
        trust_code: whether the user trusts the code that files name.

    Raises:
        UntrustedCode: the spec names code, and `trust_code` is false.
    """
    if names_code(spec) and not trust_code:
        _, _, path = spec.removeprefix(f"{PROJECTED}:").partition(":")
        raise UntrustedCode(
            f"{holder} names Python code that would be imported and run: {spec!r}, from module "
            f"{path.partition(':')[0]!r}. Nothing was imported. Code that a store or a run's folder names is "
            "run only with --trust-code (trust_code=True in Python); a source or a view can also be named in "
            "the command or the recipe."
        )
    return spec


def import_object(module_name: str, path: str, owner: str) -> Any:
    """Import a module and return one of its attributes.

    Args:
        module_name: dotted name of the module.
        path: name of the attribute, which may be dotted.
        owner: name of the part that needs the object, for the error message: `network 'python:mine:make'`.

    Raises:
        RecipeError: the module cannot be imported, or has no such attribute.
    """
    try:
        found: Any = importlib.import_module(module_name)
        for part in path.split("."):
            found = getattr(found, part)
    except ImportError as error:
        raise RecipeError(
            f"{owner}: cannot import {module_name!r}: {error}. Modules are searched on Python's import path; "
            "add their folder to PYTHONPATH"
        ) from error
    except AttributeError as error:
        near = suggestion(path, dir(found))
        raise RecipeError(f"{owner}: module {module_name!r} has no {path!r}.{near}") from error
    return found
