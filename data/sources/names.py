"""The table of sources, and functions that open a source by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from coursepack.data.sources.arrays import arrays
from coursepack.data.sources.base import Spec
from coursepack.data.sources.cifar import cifar10, cifar100
from coursepack.data.sources.digits import digits
from coursepack.data.sources.fake import fake
from coursepack.data.sources.folders import cinic10, folder, imagenet, tiny_imagenet
from coursepack.data.sources.python import python
from coursepack.data.sources.splits import hold_out, parse_hold_out
from coursepack.data.sources.tar import tar
from coursepack.errors import RecipeError, SourceError, UnknownName

if TYPE_CHECKING:
    from collections.abc import Callable

    from coursepack.data.sources.base import Source
    from coursepack.data.sources.splits import HoldOut


@dataclass(frozen=True)
class SourceKind:
    """Opening function and splits of a named source."""

    open: Callable[[Spec, Path | None], Source]
    splits: tuple[str, ...]
    """Split names; the first is the default."""
    evaluation_split: str | None
    """Split on which students are evaluated by default, or None if users have to name one."""
    any_split: bool = False
    """True if users choose the names of splits; `splits` then holds common names."""
    is_located: bool = False
    """True if a split is the location of its files, which fingerprints leave out."""


def open_source(spec: str, root: Path | None = None) -> Source:
    """Open the source `NAME`, `NAME:SPLIT`, or a hold-out of it, `NAME:SPLIT-0.1` or `NAME:SPLIT+0.1`.

    Args:
        spec: key in `SOURCES` with its options and split. The split defaults to the source's first one.
        root: folder of the data set's files, for sources that have files.

    Raises:
        UnknownName: there is no such source, option or split.
        RecipeError: `spec` is malformed, `root` is missing, or the source takes none.
        SourceError: files are missing or damaged.
    """
    parsed, held = _parse(spec)
    source = SOURCES[parsed.name].open(parsed, root)
    if held is None:
        return source
    kind = SOURCES[parsed.name]
    return hold_out(source, held, f"{parsed.name}{held}" if kind.is_located else None)


def open_stored(spec: str, root: Path | None, recorded_root: str | None) -> Source:
    """Open the source that a store's teacher saw, from `root`, else from the folder recorded in the store.

    Args:
        spec: name of the source, as for `open_source`.
        root: folder of the files now, if they have moved.
        recorded_root: folder that the store recorded.

    Raises:
        SourceError: as `open_source`, or the recorded folder no longer exists.
    """
    if root is not None or recorded_root is None:
        return open_source(spec, root)
    try:
        return open_source(spec, Path(recorded_root))
    except SourceError as error:
        raise SourceError(
            f"{error} This folder is recorded in the store: if the files have moved, give --root"
        ) from error


def evaluation_spec(spec: str) -> str:
    """Return the name of the source on which students trained on `spec` are evaluated.

    For `cifar100:train-0.1` this is the held-out part, `cifar100:train+0.1`; for other sources it is their
    evaluation split, such as `digits:test` for `digits:train`.
    """
    parsed, held = _parse(spec)
    if held is not None and held.sign == "-":
        return f"{parsed}{replace(held, sign='+')}"
    split = SOURCES[parsed.name].evaluation_split
    if split is None:
        raise RecipeError(
            f"source {spec!r} has no split for evaluation: name one with --set evaluation=SOURCE, or hold "
            f"out a part of it, as in --source '{parsed}-0.1'"
        )
    return str(replace(parsed, split=split))


def _parse(text: str) -> tuple[Spec, HoldOut | None]:
    name, _, rest = text.partition(":")
    name, comma, options = name.partition(",")
    if name not in SOURCES:
        raise UnknownName("source", name, SOURCES)
    kind = SOURCES[name]
    if comma and name not in ("fake", "tar"):
        raise RecipeError(f"source {text!r}: {name!r} has no options, but {options!r} is given")
    options = comma + options
    if name == "python":
        module, _, rest = rest.partition(":")
        factory, _, rest = rest.partition(":")
        if not module or not factory:
            raise RecipeError(f"source {text!r} is not python:module:factory or python:module:factory:SPLIT")
        options = f":{module}:{factory}"
    split, held = parse_hold_out(rest)
    if not split and not kind.splits:
        raise RecipeError(
            f"source {text!r} names no files: give a pattern, as in --source '{name}:train-{{000..099}}.tar'"
        )
    split = split or kind.splits[0]
    if split not in kind.splits and not kind.any_split:
        raise UnknownName(f"split of source {name!r}", split, kind.splits)
    return Spec(name, options, split), held


SOURCES = {
    "digits": SourceKind(digits, splits=("train", "test"), evaluation_split="test"),
    "cifar10": SourceKind(cifar10, splits=("train", "test"), evaluation_split="test"),
    "cifar100": SourceKind(cifar100, splits=("train", "test"), evaluation_split="test"),
    "cinic10": SourceKind(cinic10, splits=("train", "valid", "test"), evaluation_split="test"),
    "tiny-imagenet": SourceKind(tiny_imagenet, splits=("train", "val"), evaluation_split="val"),
    "imagenet": SourceKind(imagenet, splits=("train", "val"), evaluation_split="val"),
    "folder": SourceKind(folder, splits=("train", "val", "test"), evaluation_split="val", any_split=True),
    "arrays": SourceKind(arrays, splits=("train", "test"), evaluation_split="test", any_split=True),
    "fake": SourceKind(fake, splits=("train", "test"), evaluation_split="test"),
    "python": SourceKind(python, splits=("train", "test"), evaluation_split="test", any_split=True),
    "tar": SourceKind(tar, splits=(), evaluation_split=None, any_split=True, is_located=True),
}
