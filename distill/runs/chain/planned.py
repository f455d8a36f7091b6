"""Stores that stages will write, and the checks of the stages that read them.

These stores do not exist yet. Their manifests follow from the recipes alone, without files, so stages that
read them are checked against these as they would be against the stores.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coursepack.data import view_fingerprint
from coursepack.data.encodings import (
    FOR_FEATURES,
    FOR_LOGITS,
    drops_classes,
    parse_encoding,
    smaller_encoding,
)
from coursepack.data.store import StorePlan
from coursepack.data.store.manifest import FEATURES, LOGITS
from coursepack.data.store.planning import fresh_manifest
from coursepack.distill.runs.chain.file import STAGE
from coursepack.distill.setup.checks import check_views
from coursepack.distill.setup.requirements import term_pairs
from coursepack.distill.targets.stores import common_views
from coursepack.errors import RecipeError
from coursepack.models import TeacherRunner
from coursepack.models.taps import tap_from_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    import torch
    from numpy.typing import NDArray

    from coursepack.data import Source, ViewRecipe
    from coursepack.data.store import Manifest, StoreReader
    from coursepack.distill.recipe import TrainRecipe
    from coursepack.distill.runs.chain.file import PrecomputeConfig
    from coursepack.models import Network
    from coursepack.models.taps import Tap


@dataclass(frozen=True)
class PlannedStore:
    """Store that a stage will write, in the place of its reader."""

    path: Path
    """Reference to the stage, `stage:NAME`."""
    manifest: Manifest
    class_ids: NDArray[np.int64]

    @property
    def address(self) -> str:
        """Reference to the stage, in the place of the address of a store."""
        return str(self.path)

    @property
    def name(self) -> str:
        """Name of the stage."""
        return str(self.path).removeprefix(STAGE)

    def table_pieces(self, _name: str) -> Iterator[NDArray[Any]]:
        """Yield the labels of all samples `(N,)`, the only table that is read before there is a store."""
        yield self.class_ids


def stored_output(manifest: Manifest) -> dict[str, Any]:
    """Return what determines the values that a store holds: its fingerprint, and its arrays and views."""
    arrays = {
        name: f"{array.encoding.name}, {len(manifest.committed.get(name, ()))} views"
        for name, array in manifest.arrays.items()
    }
    return {"fingerprint": manifest.fingerprint, "arrays": arrays}


def planned_manifest(
    given: PrecomputeConfig,
    source: Source,
    view: ViewRecipe,
    network: Network,
    taps: Sequence[Tap],
    columns: Sequence[int | None] | None,
    *,
    root: str | None,
    device: torch.device,
) -> Manifest:
    """Return the manifest that the store of a stage will have, but for its teacher's weights."""
    runner = TeacherRunner(network, taps, device, columns, precision=given.precision)
    shapes = runner.row_shapes(source.channels)
    features = parse_encoding(given.feature_encoding, FOR_FEATURES)
    logits = smaller_encoding(parse_encoding(given.encoding, FOR_LOGITS), shapes[LOGITS])
    arrays = {LOGITS: (logits, shapes[LOGITS])}
    for tap in runner.taps:
        encoding = parse_encoding("bits") if tap.reduction == "sign" else features
        arrays[f"{FEATURES}{tap.name}"] = (encoding, shapes[f"{FEATURES}{tap.name}"])
    identity = {
        "teacher": {
            "network": network.spec,
            "weights": "",
            "preprocessing": network.preprocessing.model_dump(mode="json"),
            "columns": columns,
        },
        "view": {
            "recipe": view.model_dump(mode="json"),
            "fingerprint": view_fingerprint(view, source),
        },
        "source": {"name": source.name, "fingerprint": source.fingerprint},
        "precision": given.precision,
    }
    return fresh_manifest(
        StorePlan(
            identity=identity,
            origin={"root": None if root is None else str(Path(root).expanduser().absolute())},
            labels=source.labels,
            class_names=source.class_names,
            views=given.views,
            arrays=arrays,
            static={name: value.numpy() for name, value in runner.static().items()},
            block_rows=given.block_rows,
        )
    )


def check_stored_views(recipe: TrainRecipe, readers: Sequence[StoreReader]) -> None:
    """Check the number of views that a stage trains on, which its stores must have."""
    views = [] if recipe.views is None else list(range(recipe.views))
    if readers:
        planned = [reader.manifest.views for reader in readers if isinstance(reader, PlannedStore)]
        existing = [reader for reader in readers if not isinstance(reader, PlannedStore)]
        common = [len(common_views(existing, [[] for _ in existing]))] if existing else []
        stored = [*planned, *common]
        if recipe.views is not None and recipe.views > min(stored):
            raise RecipeError(
                f"views is {recipe.views}, but its stores have {min(stored)}: leave views out, or give the "
                f"stages that write them views: {recipe.views}"
            )
        views = views or list(range(min(stored)))
    if views:
        check_views(recipe, views)


def check_stored_arrays(recipe: TrainRecipe, readers: Sequence[StoreReader], student: Network) -> None:
    """Check that the stores of earlier stages will hold the logits and features that a method reads."""
    dense = recipe.objective.needs().dense_logits
    for reader in readers:
        encoding = reader.manifest.arrays[LOGITS].encoding
        if dense and isinstance(reader, PlannedStore) and drops_classes(encoding):
            raise RecipeError(
                f"method {recipe.method!r} ({dense}) needs all logits, but stage {reader.name!r} stores only "
                f"the largest ({encoding.name}): give it encoding: float16"
            )
    pairs = term_pairs(recipe.objective, [reader.manifest for reader in readers], student)
    for index, tap, _ in (pair for of_term in pairs.values() for pair in of_term):
        reader = readers[index]
        if isinstance(reader, PlannedStore) and f"{FEATURES}{tap}" not in reader.manifest.arrays:
            raise RecipeError(
                f"method {recipe.method!r} needs features that stage {reader.name!r} does not store: give "
                f"it taps: [{tap_from_name(tap).text!r}]"
            )
