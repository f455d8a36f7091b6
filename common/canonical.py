"""Canonical JSON: one text per value, so that equal values have equal bytes and fingerprints.

Keys are sorted, `None` members of mappings are left out (an optional field added later with the default
`None` does not change old fingerprints), and floats are written in Python's shortest exact form.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

MAX_ROWS = 20
"""Maximum number of differences in an error message."""
MAX_SHOWN = 200
"""Maximum number of characters of a value in an error message."""
_ABSENT = object()


def canonical_json(value: Any, *, indent: int | None = None) -> str:
    """Return the canonical JSON text of a value.

    Raises:
        ValueError: the value contains NaN or infinity, which JSON cannot represent.

    >>> canonical_json({"b": 1, "a": None})
    '{"b":1}'
    """
    separators = (",", ":") if indent is None else (",", ": ")
    return json.dumps(
        _without_none(value), sort_keys=True, indent=indent, separators=separators, allow_nan=False
    )


def checked_lines(values: dict[str, Any], checksum: str) -> str:
    """Return the canonical JSON text of an object, one member per line, including a checksum.

    Python's `json` has an encoder in C, but does not use it with `indent`.

    Args:
        values: object to write; no member is None.
        checksum: name of the added member, whose value is `fingerprint(values)`.

    >>> print(checked_lines({"b": [1, 2], "a": {"d": 0}}, "c"))
    {
     "a":{"d":0},
     "b":[1,2],
     "c":"537245c2f96a1b566883ebca4dd695625abef3eef90aa464076e9d9f7ebdadec"
    }
    """
    members = {name: f'"{name}":{canonical_json(values[name])}' for name in sorted(values)}
    digest = hashlib.sha256(f"{{{','.join(members.values())}}}".encode()).hexdigest()
    members[checksum] = f'"{checksum}":"{digest}"'
    lines = ",\n".join(f" {members[name]}" for name in sorted(members))
    return f"{{\n{lines}\n}}"


def fingerprint(value: Any) -> str:
    """Return the sha256 of the canonical JSON of a value, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def differences(left: Any, right: Any, path: str = "") -> list[tuple[str, str, str]]:
    """Return the differences of two JSON values: `(path, left, right)` per leaf, `-` for a missing one.

    >>> differences({"seed": 0, "ops": [1]}, {"seed": 1, "ops": [1, 2]})
    [('ops[1]', '-', '2'), ('seed', '0', '1')]
    """
    if isinstance(left, dict) and isinstance(right, dict):
        keys = sorted({*left, *right})
        pairs = [(left.get(k, _ABSENT), right.get(k, _ABSENT), f"{path}.{k}" if path else k) for k in keys]
    elif isinstance(left, list) and isinstance(right, list):
        length = max(len(left), len(right))
        pairs = [
            (left[i] if i < len(left) else _ABSENT, right[i] if i < len(right) else _ABSENT, f"{path}[{i}]")
            for i in range(length)
        ]
    elif left is right or (_ABSENT not in (left, right) and canonical_json(left) == canonical_json(right)):
        return []
    else:
        return [(path, _shown(left), _shown(right))]
    return [row for a, b, where in pairs for row in differences(a, b, where)]


def difference_table(left: Any, right: Any, left_name: str, right_name: str) -> str:
    """Format `differences` as aligned lines, one per leaf, for error messages."""
    rows = [(path, cut(a), cut(b)) for path, a, b in differences(_without_none(left), _without_none(right))]
    rows, more = rows[:MAX_ROWS], len(rows) - MAX_ROWS
    path_width = max((len(path) for path, _, _ in rows), default=0)
    left_width = max((len(a) for _, a, _ in rows), default=0)
    lines = [
        f"  {path:<{path_width}}   {left_name}: {a:<{left_width}}   {right_name}: {b}" for path, a, b in rows
    ]
    return "\n".join([*lines, f"  and {more:,} more"] if more > 0 else lines)


def cut(text: str) -> str:
    """Shorten a text to `MAX_SHOWN` characters, followed by an ellipsis."""
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def _shown(value: Any) -> str:
    return "-" if value is _ABSENT else canonical_json(value).strip('"')


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            str(k): v if isinstance(v, str) else _without_none(v) for k, v in value.items() if v is not None
        }
    if isinstance(value, (list, tuple)):
        return [_without_none(v) for v in value]
    return value
