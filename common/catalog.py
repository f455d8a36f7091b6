"""Names and options of the commands, which help and completion read instead of importing torch.

`catalog.json` is written by `python -m coursepack.distill.cli.catalog`; a test compares it with the tables.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

FILE = "catalog.json"


@cache
def read_catalog() -> dict[str, dict[str, Any]]:
    """Return the catalog: names by kind under `names`, and descriptions of options under `options`."""
    content: dict[str, dict[str, Any]] = json.loads(files("coursepack").joinpath(FILE).read_text("utf-8"))
    return content


def names_of(kind: str) -> tuple[str, ...]:
    """Return the names of a kind, such as `method`, `network`, `source` or `view`."""
    return tuple(read_catalog()["names"][kind])
