"""Wrong names in a recipe's plain values, found before torch is imported.

A recipe is checked when it is resolved, which imports every loss and source. The fields of all configs are in
the catalog too, so that wrong names are refused here, in the same words, if all other values are clearly
right. Otherwise nothing is refused here: the full check reports all errors of a file together.
"""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coursepack.canonical import cut
from coursepack.catalog import names_of, read_catalog
from coursepack.config import MAX_LINES, refusal
from coursepack.distill.renamed import check_renamed
from coursepack.errors import CoursepackError, UnknownName
from coursepack.problems import did_you_mean, shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ROOT = "recipe.TrainRecipe"
"""Key of a recipe's config in the catalog."""
TAGS = {"fusion": ("name", "fixed"), "exchange": ("name", "outputs")}
"""Key that names the member of a family, and its default, by field of an objective."""


class _Unclear(Exception):
    """A value that only the full check can judge."""


def check_names(values: Mapping[str, Any], where: str) -> None:
    """Check the names in a recipe's plain values: of fields, methods, networks, sources and views.

    Args:
        values: recipe fields.
        where: file or command that the fields came from, for error messages.

    Raises:
        UnknownName, RecipeError: a name is wrong. Values that are not right otherwise raise no error here,
            and neither do names of a row that was added to a table after the catalog was written.
    """
    if "torch" in sys.modules:
        return  # the full check costs nothing more, and knows rows that this process added
    check_renamed(dict(values), where)
    try:
        _check_names(values, where)
    except CoursepackError:
        if not _are_in_sources(set(_words(values))):
            raise


def _check_names(values: Mapping[str, Any], where: str) -> None:
    """Check names against the catalog."""
    view = values.get("view")
    if isinstance(view, str) and not view.endswith((".yaml", ".yml")) and view not in names_of("view"):
        raise UnknownName("view", view, [*names_of("view"), "a .yaml file"])
    method = values.get("method", "kd" if values.get("stores") else "supervised")
    lines = wrong_names(values, method)
    if lines:
        raise refusal(lines, where)
    if isinstance(method, str) and method not in names_of("method"):
        raise UnknownName("method", method, names_of("method"))
    source = values.get("source")
    if isinstance(source, str) and (name := source.partition(":")[0].partition(",")[0]) not in names_of(
        "source"
    ):
        raise UnknownName("source", name, names_of("source"))
    student, forms = values.get("student"), [*names_of("hub"), "run:FOLDER"]
    known = {*names_of("network"), *(form.partition(":")[0] for form in forms)}
    if isinstance(student, str) and ":" not in student and student not in known:
        raise UnknownName("network", student, [*names_of("network"), *forms])


def _words(value: Any) -> Iterator[str]:
    """Yield the keys and values of nested plain values that may be names."""
    for each in (*value.keys(), *value.values()) if isinstance(value, dict) else value:
        if isinstance(each, (dict, list)):
            yield from _words(each)
        elif isinstance(each, str) and re.fullmatch(r"[\w-]+", each):
            yield each


def _are_in_sources(words: set[str]) -> bool:
    """Return whether sources of this package have one of the words that the catalog does not have."""
    package, catalog = Path(__file__).parents[1], json.dumps(read_catalog())
    unknown = [re.escape(word) for word in words if f'"{word}"' not in catalog]
    pattern = re.compile(rf"\b({'|'.join(unknown)})\b")
    files = (path for room in ("data", "distill", "models") for path in (package / room).rglob("*.py"))
    return bool(unknown) and any(pattern.search(path.read_text()) for path in files)


def wrong_names(values: Mapping[str, Any], method: Any) -> list[str]:
    """Return a line for each wrong name, or none if any other value may be wrong too."""
    tags = read_catalog()["methods"].get(method, {}) if isinstance(method, str) else {}
    checked, objective = dict(values), values.get("objective")
    if isinstance(checked.get("view"), str):
        del checked["view"]
    if isinstance(objective, dict):
        checked["objective"] = _tagged(objective, tags)
    try:
        lines = _Check(_given(tags)).fields(checked, ROOT, ())
    except _Unclear:
        return []
    return lines if len(lines) <= MAX_LINES else []


def _tagged(objective: Mapping[str, Any], tags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an objective with the names of its families' members, as the method has them."""
    tagged = dict(objective)
    for field, (key, usual) in TAGS.items():
        if isinstance(tagged.get(field), dict):
            tagged[field] = {key: tags.get(field, usual), **tagged[field]}
    terms = tagged.get("terms")
    if isinstance(terms, dict):
        usual_terms = tags.get("terms", {})
        ordered = {**{name: terms[name] for name in usual_terms if name in terms}, **terms}
        tagged["terms"] = {
            name: {"term": usual_terms.get(name, name), **term} if isinstance(term, dict) else term
            for name, term in ordered.items()
            if term is not None
        }
    return tagged


def _given(tags: Mapping[str, Any]) -> frozenset[tuple[str, ...]]:
    """Return the paths of groups of an objective whose other fields the method gives."""
    paths = {("objective",), *(("objective", field) for field in TAGS)}
    return frozenset(paths | {("objective", "terms", name) for name in tags.get("terms", {})})


@dataclass(frozen=True)
class _Check:
    """Search for wrong names in plain values."""

    incomplete: frozenset[tuple[str, ...]]
    """Paths of groups that need not have all required fields."""

    def value(self, value: Any, kinds: Sequence[Mapping[str, Any]], path: tuple[str, ...]) -> list[str]:
        """Return the lines of a value, which has to be of one of some kinds."""
        fitting = [kind for kind in kinds if _is_right(value, kind)]
        if not fitting:
            choices = [kind for kind in kinds if kind["kind"] != "null"]
            if isinstance(value, str) and len(choices) == 1 and choices[0]["kind"] == "choice":
                return [_wrong_choice(value, choices[0]["choices"], path)]
            raise _Unclear
        kind = fitting[0]
        if kind["kind"] == "config":
            return self.fields(value, kind["config"], path)
        if kind["kind"] == "family":
            return self.member(value, kind, path)
        if kind["kind"] not in ("mapping", "list"):
            return []
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return [line for key, each in pairs for line in self.value(each, kind["of"], (*path, str(key)))]

    def member(self, values: dict[str, Any], family: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
        """Return the lines of a member of a family of configs."""
        key, members = family["key"], family["members"]
        tag = values.get(key)
        if not isinstance(tag, str):
            raise _Unclear
        if tag not in members:
            near = did_you_mean(tag, members) or f", expected one of {', '.join(map(repr, members))}"
            return [_line(path, f"unknown {key} {cut(repr(tag))}{near}")]
        return self.fields(values, members[tag], path, tag, family["known"].get(tag, members.values()))

    def fields(
        self,
        values: Mapping[str, Any],
        config: str,
        path: tuple[str, ...],
        tag: str | None = None,
        known: Sequence[str] = (),
    ) -> list[str]:
        """Return the lines of a config's fields.

        Args:
            values: plain values.
            config: key of the config in the catalog.
            path: path of the config.
            tag: its name in its family, if it has one.
            known: configs from whose fields a name is suggested; defaults to this one.
        """
        configs = read_catalog()["configs"]
        fields, lines = configs[config], []
        for name, field in fields.items():
            if name in values:
                lines += self.value(values[name], field["kinds"], (*path, name))
            elif field["required"] and path and path not in self.incomplete:
                raise _Unclear
        names = [name for each in known or [config] for name in configs[each]]
        end = "" if tag is None else f" of {tag!r}"
        return lines + [
            _line((*path, name), f"unknown key{did_you_mean(name, names) or end}")
            for name in values
            if name not in fields
        ]


def _is_right(value: Any, kind: Mapping[str, Any]) -> bool:
    """Return true if a value is of a kind; what is inside of mappings and lists is not looked at."""
    name = kind["kind"]
    if name in ("integer", "number"):
        is_number = type(value) is int or (name == "number" and type(value) is float and math.isfinite(value))
        return is_number and _is_within(value, kind["limits"])
    if name == "list":
        return isinstance(value, list) and kind.get("length", len(value)) == len(value)
    if name in ("config", "family", "mapping"):
        return isinstance(value, dict) and all(
            isinstance(key, str) and re.search(kind.get("keys", ""), key) for key in value
        )
    if name == "choice":
        return isinstance(value, str) and value in kind["choices"]
    types = {"null": type(None), "flag": bool, "text": str, "any": object}
    return name in types and isinstance(value, types[name])


def _is_within(value: float, limits: Mapping[str, Any]) -> bool:
    low, high = limits.get("min", -math.inf), limits.get("max", math.inf)
    return (low < value or (low == value and not limits["min_open"])) and (
        value < high or (high == value and not limits["max_open"])
    )


def _wrong_choice(value: str, choices: Sequence[str], path: tuple[str, ...]) -> str:
    *others, last = map(repr, choices)
    expected = f"{', '.join(others)} or {last}" if others else last
    return _line(path, f"expected {expected}, got {shown(value)}{did_you_mean(value, choices)}")


def _line(path: tuple[str, ...], text: str) -> str:
    return f"{'.'.join(map(cut, path))}: {text}"
