"""The interface of a cache, and what is said about the use of a store that was imported from one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from coursepack.errors import RecipeError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from coursepack.data import Source, ViewRecipe
    from coursepack.data.store import Manifest

IMPORTED = "imported"
"""Member of a store's `identity["teacher"]` with the facts of the cache."""
FIXED, REPLAYED, EXPORTED = "fixed", "recorded", "exported"
"""Kinds of views of an imported store, member `views` of its facts."""
USES = {
    FIXED: (
        "without views of its own: for the one view {view} that it is said to have been made for. Students "
        "see the same pixels in every epoch; nothing can be added to them"
    ),
    REPLAYED: "with recorded views: students see the crops and flips that the teacher saw",
    EXPORTED: "with views of coursepack: the file has the fingerprint of the view that it was exported with",
}
LACKS = "no features, head or teacher: not for --online, --tap, `verify --deep` or `verify --repair`"


@dataclass(frozen=True)
class CacheOptions:
    """Options of an import that concern the reading of the cache."""

    path: Path
    """File or folder of the cache."""
    source: Source
    view: ViewRecipe | None = None
    """View that the cache was made for; None if the cache records its own."""
    array: str | None = None
    """Name of the array in a file of several. Defaults to `logits`, or to the only one."""
    values: str = "logits"
    """Meaning of arrays: `logits` or `probs`."""
    label_type: str = "marginal_smoothing_k5"
    """Type of FKD's labels, as its `--soft_label_type`."""
    replay_seeds: bool = False
    """Replay the seeds of TinyViT's records as crops and flips."""
    temperature: float = 1.0
    """Temperature of the softmax that gave probabilities."""

    @property
    def classes(self) -> int:
        """Number of classes C of the source."""
        return len(self.source.class_names)

    @property
    def samples(self) -> int:
        """Number of samples N of the source."""
        return len(self.source.labels)


class Rows(Protocol):
    """Answers of one view for consecutive samples."""

    @property
    def params(self) -> NDArray[np.int32] | None:
        """Recorded view parameters `(n, 5)`; None if the cache has none."""

    def logits(self, rows: slice) -> NDArray[np.float32]:
        """Return the logits `(n, C)` of some of the samples."""


class Cache(Protocol):
    """Cache of a teacher's answers, opened and checked."""

    views: int
    """Number of views V."""
    recipe: ViewRecipe
    """Recipe of the views that students see."""
    facts: dict[str, Any]
    """Origin and meaning of the answers, for the store's identity: `format`, `views` and more."""
    digest: str
    """sha256 over all answers."""
    encoding: str
    """Encoding of logits that keeps the cache's precision."""
    by_sample: bool
    """True if all views of some samples are read together."""
    sample_bytes: int
    """Memory in bytes that one sample takes while its block is written."""

    def load(self, view: int, start: int, stop: int) -> Rows:
        """Return the answers of a view for the samples `start` to `stop`."""


def given_view(options: CacheOptions, other: str) -> ViewRecipe:
    """Return the view that the user says a cache was made for.

    Args:
        options: options of the import.
        other: advice for views that are drawn at random.

    Raises:
        RecipeError: no view is given, or it is drawn at random.
    """
    if options.view is None:
        raise RecipeError(
            f"{str(options.path)!r} does not say which view of the images the teacher saw: give --view none "
            "(the "
            f"whole image), eval (resized, center crop) or a .yaml file. {other}"
        )
    if not options.view.is_fixed:
        names = ", ".join(op.op for op in options.view.ops) or "mix"
        raise RecipeError(
            f"the view ({names}) is drawn at random, and {str(options.path)!r} does not say what was drawn: "
            "students would see other pixels than the teacher. Give the view without random ops that the "
            "cache "
            f"was made for, such as none or eval. {other}"
        )
    return options.view


def describe_use(manifest: Manifest) -> str | None:
    """Return what an imported store can and cannot be used for; None for stores of `precompute run`."""
    facts = manifest.identity.get("teacher", {}).get(IMPORTED)
    if facts is None:
        return None
    ops = manifest.identity["view"]["recipe"].get("ops", ())
    view = ", ".join(str(op["op"]) for op in ops) or "none"
    use = USES.get(str(facts.get("views")), "with views of an unknown kind").format(view=f"({view})")
    return f"{facts.get('format')} cache, {use}; {LACKS}"
