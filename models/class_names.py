"""Correspondence of classes by name: spelling, synonyms and WordNet ids."""

from __future__ import annotations

import difflib
import functools
import re
from typing import TYPE_CHECKING

from coursepack.console import inform, warn
from coursepack.errors import TeacherMismatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

LABEL = re.compile(r"LABEL_\d+")
"""Name that transformers gives to a class without a name."""
WORDNET = re.compile(r"n\d{8}")
"""Name of a class in ImageNet's folders."""
CUTOFF = 0.6
"""Least similarity of names that are proposed."""


def columns_by_name(
    spec: str, trained_on: Sequence[str], class_names: Sequence[str]
) -> tuple[int, ...] | None:
    """Return the index of the teacher's class for each class of a source, by exact names.

    Args:
        spec: spec of the teacher, for messages.
        trained_on: names of the teacher's classes.
        class_names: names of the source's classes.

    Returns:
        None if the classes are the same in the same order.

    Raises:
        TeacherMismatch: the names are not the same set.
    """
    if list(trained_on) == list(class_names):
        return None
    if all(LABEL.fullmatch(name) for name in trained_on):
        if len(trained_on) != len(class_names):
            return None  # refused later by the number of classes
        warn(
            f"warning: {spec}: its classes have no names ({trained_on[0]}, ...), so they are taken to be the "
            f"source's {len(class_names)} in the same order ({', '.join(class_names[:3])}, ...)"
        )
        return None
    if sorted(trained_on) != sorted(class_names) or len(set(trained_on)) < len(trained_on):
        found = sum(column is not None for column in match_names(class_names, trained_on))
        raise TeacherMismatch(
            f"the {len(trained_on)} classes of teacher {spec!r} ({', '.join(trained_on[:3])}, ...) are not "
            f"the source's {len(class_names)} ({', '.join(class_names[:3])}, ...); {found} of those are "
            "found by name: give --classes FILE to map them; if there is no such file, it is written with "
            "the nearest names"
        )
    index = {name: column for column, name in enumerate(trained_on)}
    inform(f"{spec}: its classes are in another order; the source's order is used")
    return tuple(index[name] for name in class_names)


def match_names(class_names: Sequence[str], trained_on: Sequence[str]) -> list[int | None]:
    """Return the index of the teacher's class for each class of a source, None where no name agrees.

    Names agree if they are equal; equal up to case, hyphens and underscores; if one is a synonym in the
    other, as in `tench, Tinca tinca`; or if one is the WordNet id of the other. No class of the teacher is
    given twice, and none that several names of the teacher agree with.
    """
    columns: list[int | None] = [None] * len(class_names)
    for forms in FORMS:
        known = _unique(trained_on, forms)
        for index, name in enumerate(class_names):
            found = {known[form] for form in forms(name) if form in known}
            if columns[index] is None and len(found) == 1 and not found & set(columns):
                columns[index] = found.pop()
    return columns


def nearest_names(name: str, trained_on: Sequence[str], most: int = 3) -> list[str]:
    """Return the names of the teacher's classes that are most similar to a name."""
    by_spelling = {_whole(known)[0]: known for known in trained_on}
    near = difflib.get_close_matches(_whole(name)[-1], by_spelling, n=most, cutoff=CUTOFF)
    return [by_spelling[each] for each in near]


def _unique(names: Sequence[str], forms: Callable[[str], Iterable[str]]) -> dict[str, int]:
    """Return the index of the one name that has each form; forms of several names are left out."""
    owners: dict[str, set[int]] = {}
    for index, name in enumerate(names):
        for form in forms(name):
            owners.setdefault(form, set()).add(index)
    return {form: next(iter(indices)) for form, indices in owners.items() if len(indices) == 1}


def _exact(name: str) -> list[str]:
    return [name]


def _whole(name: str) -> list[str]:
    """Return a name without case, hyphens and underscores, and WordNet's words for an id in the same form."""
    texts = [name, _lemmas()[name]] if WORDNET.fullmatch(name) and name in _lemmas() else [name]
    return [re.sub(r"[\s_-]+", " ", text).strip().casefold() for text in texts]


def _synonyms(name: str) -> list[str]:
    return [part.strip() for text in _whole(name) for part in text.split(",")]


FORMS = (_exact, _whole, _synonyms)
"""Functions from a name to the texts by which it is found, the strictest first."""


@functools.lru_cache
def _lemmas() -> dict[str, str]:
    """Return WordNet's words for each id, from the tables that timm ships; empty without timm."""
    try:
        from timm.data import ImageNetInfo
    except ImportError:
        return {}
    info = ImageNetInfo("imagenet22k")
    return {name: info.label_name_to_description(name, detailed=False) for name in info.label_names()}
