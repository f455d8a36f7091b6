"""Errors of pydantic in the words of people who write YAML: where, expected, got.

pydantic names types of Python, puts tags of unions into paths, and begins with `Input should be`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coursepack.canonical import cut
from coursepack.errors import nearest
from coursepack.unions import keys_at, merge_errors, without_tags

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pydantic import BaseModel, ValidationError

EXPECTED = {
    "bool": "true or false",
    "bytes": "text",
    "date": "a date",
    "decimal": "a number",
    "dict": "a mapping",
    "finite_number": "a finite number",
    "float": "a number",
    "frozen_set": "a list",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "int": "an integer",
    "iterable": "a list",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "list": "a list",
    "literal_error": "{expected}",
    "mapping": "a mapping",
    "model": "a mapping",
    "model_attributes": "a mapping",
    "multiple_of": "a multiple of {multiple_of}",
    "none_required": "null",
    "number": "a number",
    "sequence": "a list",
    "set": "a list",
    "string": "text",
    "string_pattern_mismatch": "text of the form {pattern}",
    "string_too_long": "{max_length} or fewer characters",
    "string_too_short": "{min_length} or more characters",
    "too_long": "{max_length} or fewer entries",
    "too_short": "{min_length} or more entries",
    "tuple": "a list",
    "union": "{expected}",
}
"""What is expected, by pydantic's type of error or by its beginning."""
COMBINED = "value_error"
"""pydantic's type of the errors that validators of a config raise."""


def lines_of(model: type[BaseModel], error: ValidationError) -> list[str]:
    """Return a line for each wrong field of a config: its path, what is expected, and what was got."""
    return lines_of_problems(model, error.errors())


def lines_of_problems(model: type[BaseModel], problems: list[Any]) -> list[str]:
    """Return the lines of some of pydantic's errors, as `lines_of`."""
    return [_line(model, problem) for problem in merge_errors(model, problems)]


def is_combined(problem: Mapping[str, Any]) -> bool:
    """Return true if an error concerns a combination of fields instead of one field."""
    return bool(problem["type"] == COMBINED and isinstance(problem["input"], dict))


def _line(model: type[BaseModel], problem: Mapping[str, Any]) -> str:
    path = ".".join(cut(str(part)) for part in without_tags(model, problem["loc"])) or "it"
    return f"{path}: {_text(model, problem)}"


def _text(model: type[BaseModel], problem: Mapping[str, Any]) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(model, problem["loc"])
    if kind == "missing":
        return "is missing"
    got = f", got {shown(problem['input'])}"
    if kind == "union_tag_invalid":
        key, tag, tags = (str(context[part]) for part in ("discriminator", "tag", "expected_tags"))
        near = did_you_mean(tag, tags.replace("'", "").split(", "))
        return f"unknown {key.strip(chr(39))} {cut(repr(tag))}{near or ', expected one of ' + tags}"
    if kind == "union_tag_not_found":
        return f"{context['discriminator']} is missing{got}"
    if kind == COMBINED:
        message = str(problem["msg"]).removeprefix("Value error, ")
        return message if is_combined(problem) else message + got
    expected = _expected(kind)
    if expected is None:
        return f"is not valid{got}"
    near = (
        did_you_mean(str(problem["input"]), _literals(context)) if kind in ("literal_error", "union") else ""
    )
    numbers = {name: f"{value:g}" for name, value in context.items() if isinstance(value, float)}
    return f"expected {expected.format_map({**context, **numbers})}{got}{near}"


def _unknown_key(model: type[BaseModel], path: tuple[str | int, ...]) -> str:
    """Return that a key is unknown, with the nearest known one, or else the family's member that lacks it."""
    near = did_you_mean(str(path[-1]), keys_at(model, path[:-1]))
    has_tag = len(path) > 1 and without_tags(model, path[:-1]) == without_tags(model, path[:-2])
    return f"unknown key{near or (f' of {path[-2]!r}' if has_tag else '')}"


def _expected(kind: str) -> str | None:
    """Return what is expected for an error such as `int_parsing_size`."""
    while kind not in EXPECTED:
        kind, _, end = kind.rpartition("_")
        if not end:
            return None
    return EXPECTED[kind]


def _literals(context: Mapping[str, Any]) -> list[str]:
    """Return the texts in quotes of an error's expected values."""
    return str(context["expected"]).split("'")[1::2]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a question with the nearest known name, or nothing if none is similar."""
    near = nearest(word, known)
    return f", did you mean {near!r}?" if near else ""


def shown(value: Any) -> str:
    """Return a value as YAML has it, shortened."""
    constants = {"None": "null", "True": "true", "False": "false"}
    text = repr(value)
    return constants.get(text, cut(text))
