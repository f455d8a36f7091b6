"""Packages whose public names are imported when they are first used, from their `__getattr__`."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


def public_name(package: str, modules: Mapping[str, str], name: str) -> Any:
    """Import a public name of a package, and keep it there.

    Args:
        package: name of the package.
        modules: module within the package by public name.
        name: the name that was asked for.

    Raises:
        AttributeError: the package has no such public name.
    """
    if name not in modules:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{package}.{modules[name]}"), name)
    setattr(sys.modules[package], name, value)
    return value
