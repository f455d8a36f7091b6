"""Strict parsers for JSON and YAML from untrusted files.

They reject duplicate keys, deep nesting, YAML aliases that expand to many values, very long numbers, bytes
that are not UTF-8, and very large files, so that later code need not expect them. YAML is restricted to the
types of JSON: null, booleans, numbers, text, lists and mappings; dates stay text.
"""

from __future__ import annotations

import json
import math
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Hashable
    from pathlib import Path

    from coursepack.errors import CoursepackError

MAX_DEPTH = 64
"""Maximum number of nested lists and mappings."""
MAX_DIGITS = 40
"""Maximum number of digits of an integer, and of characters of a number in YAML."""
MAX_REPEATED = 10_000
"""Maximum number of values that the aliases of a YAML text expand to."""
MAX_YAML_BYTES = 1 << 20
MAX_YAML_VALUES = 100_000
MAX_JSON_BYTES = 64 << 20


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON text into plain values; bytes are decoded as UTF-8.

    Raises:
        ValueError: the text is rejected. The message is a predicate, to be put after the name of the text:
            `is not JSON: ...`.

    >>> parse_json('{"seed": 1, "seed": 2}')
    Traceback (most recent call last):
    ValueError: gives the key 'seed' twice
    """
    try:
        value = json.loads(
            _decoded(text, "JSON"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_short,
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} (line {error.lineno}, column {error.colno})") from error
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    _check_depth(value)
    return value


def read_json(path: Path, kind: type[CoursepackError], max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Return the plain values in a JSON file.

    Args:
        path: file to read.
        kind: class of the error to raise.
        max_bytes: maximum size of the file; a larger one is rejected without reading it.

    Raises:
        CoursepackError: the file cannot be read or is rejected; of class `kind`.
    """
    try:
        return parse_json(read_bounded(path, max_bytes))
    except ValueError as error:
        raise kind(f"{str(path)!r} {error}") from error
    except OSError as error:
        raise kind(f"cannot read {str(path)!r}: {error.strerror or error}") from error


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Return the content of a regular file of at most `max_bytes` bytes.

    Raises:
        ValueError: the file is not regular, or is larger; the message is a predicate as in `parse_json`.
        OSError: the file cannot be read.
    """
    status = path.stat()  # before opening, which would block on a FIFO without a writer
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise ValueError("is not a regular file")
    if status.st_size > max_bytes:
        raise ValueError(f"has {status.st_size:,} bytes, expected at most {max_bytes:,}")
    with path.open("rb") as file:
        return file.read(status.st_size)


def parse_yaml(text: str | bytes) -> Any:
    """Parse a YAML text into plain values; bytes are decoded as UTF-8.

    Raises:
        ValueError: the text is rejected; the message is a predicate as in `parse_json`.

    >>> parse_yaml("{lr: 0.1, on: 2026-01-31}")
    {'lr': 0.1, True: '2026-01-31'}
    """
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"is longer than {MAX_YAML_BYTES:,} bytes")
    text = _decoded(text, "YAML")
    try:
        _check_events(text)
        return yaml.load(text, Loader=_PlainLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML: {error}") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"is not YAML: it is not text (it holds {error.object[error.start]!r})") from error


def _decoded(text: str | bytes, kind: str) -> str:
    try:
        return text if isinstance(text, str) else text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"is not {kind}: it is not text (byte {error.start:,} is not UTF-8)") from error


# JSON


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]  # add gives None
        raise ValueError(_twice(repeated))
    return values


def _twice(key: object) -> str:
    return f"gives the key {key!r:.80} twice"


def _refuse_constant(name: str) -> float:
    raise ValueError(f"holds {name}, which JSON cannot represent")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"holds the number {digits[:MAX_DIGITS]}, which is too large")
    return value


def _short(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"holds a whole number of {len(digits):,} digits, expected at most {MAX_DIGITS}")
    return int(digits)


_TOO_DEEP = f"is nested more than {MAX_DEPTH} levels deep"


def _check_depth(value: Any) -> None:
    level: list[Any] = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        level = [inner for each in level for inner in _children(each)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _children(value: dict[str, Any] | list[Any]) -> list[dict[str, Any] | list[Any]]:
    """Return the mappings and lists directly inside a mapping or list."""
    inner = value.values() if isinstance(value, dict) else value
    return [each for each in inner if isinstance(each, (dict, list))]


# YAML

_TAG = "tag:yaml.org,2002:"


@dataclass
class _Extent:
    """Size of a YAML value with its aliases expanded."""

    anchor: str | None = None
    values: int = 1
    depth: int = 0

    def add(self, inner: _Extent) -> None:
        self.values += inner.values
        self.depth = max(self.depth, inner.depth + 1)


def _check_events(text: str) -> None:
    """Reject deep nesting and recursive or large aliases before any value is constructed."""
    anchors: dict[str, _Extent] = {}
    unfinished: list[_Extent] = []
    values = repeated = 0
    for event in yaml.parse(text, Loader=_PlainLoader):
        if isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)):
            unfinished.append(_Extent(event.anchor))
            depth = len(unfinished)
        elif isinstance(event, yaml.AliasEvent):
            name = event.anchor or ""
            if any(each.anchor == name for each in unfinished):
                raise ValueError(f"repeats {'*' + name!r:.80} within itself")
            ended = anchors.get(name, _Extent())  # an undefined alias is rejected later by the loader
            repeated += ended.values
            depth = len(unfinished) + ended.depth
        elif isinstance(event, yaml.ScalarEvent):
            ended, depth = _Extent(event.anchor), 0
        elif isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
            ended, depth = unfinished.pop(), 0
        else:
            continue  # start and end of the stream and its documents
        if isinstance(event, (yaml.ScalarEvent, yaml.CollectionEndEvent)):
            values += 1
            if ended.anchor is not None:
                anchors[ended.anchor] = ended
        if not isinstance(event, yaml.CollectionStartEvent) and unfinished:
            unfinished[-1].add(ended)
        if depth > MAX_DEPTH:
            raise ValueError(_TOO_DEEP)
        if repeated > MAX_REPEATED:
            raise ValueError(f"repeats more than {MAX_REPEATED:,} values by aliases")
        if values > MAX_YAML_VALUES:
            raise ValueError(f"holds more than {MAX_YAML_VALUES:,} values")


# The C parser, which PyYAML may be built without, takes a tenth of the time.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _PlainLoader(_Loader):  # type: ignore[misc]  # a class only known at run time
    """Loader that constructs only the types of JSON and rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Construct a mapping; keys merged in by `<<` may be overridden."""
        seen: set[Hashable] = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # the base class reports its position
            is_merge = key_node.tag == f"{_TAG}merge"
            key = key_node.value if is_merge else self.construct_object(key_node)
            if seen & {key, str(key)}:
                raise ValueError(_twice(key))
            seen |= {key, str(key)}
        values: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
        return values

    def number(self, node: yaml.ScalarNode) -> Any:
        """Construct a number of at most `MAX_DIGITS` characters."""
        if len(node.value) > MAX_DIGITS:
            raise ValueError(
                f"holds a number of {len(node.value):,} characters, expected at most {MAX_DIGITS}"
            )
        is_int = node.tag.endswith(":int")
        try:
            return self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)
        except (ValueError, IndexError) as error:
            raise ValueError(f"holds {node.value!r} as a number") from error

    def boolean(self, node: yaml.ScalarNode) -> Any:
        """Construct a boolean."""
        try:
            return self.construct_yaml_bool(node)
        except KeyError as error:
            raise ValueError(f"holds {node.value!r:.80} as a boolean") from error

    def text(self, node: yaml.ScalarNode) -> str:
        """Construct text without null characters and surrogates, which file names cannot contain."""
        value = str(self.construct_scalar(node))
        wrong = next((c for c in value if c == "\0" or "\ud800" <= c <= "\udfff"), None)
        if wrong is not None:
            raise ValueError(f"holds the character {wrong!r}")
        return value


_PlainLoader.yaml_constructors = {
    f"{_TAG}null": _PlainLoader.construct_yaml_null,
    f"{_TAG}bool": _PlainLoader.boolean,
    f"{_TAG}int": _PlainLoader.number,
    f"{_TAG}float": _PlainLoader.number,
    f"{_TAG}str": _PlainLoader.text,
    f"{_TAG}timestamp": _PlainLoader.text,
    f"{_TAG}seq": _PlainLoader.construct_yaml_seq,
    f"{_TAG}map": _PlainLoader.construct_yaml_map,
    None: _PlainLoader.construct_undefined,
}
