"""Schema of the teacher, view and source in a manifest, limited to the members that commands use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coursepack.data.views.recipe import ViewRecipe
from coursepack.errors import StoreDamaged
from coursepack.problems import lines_of

if TYPE_CHECKING:
    from coursepack.data.store.manifest import Manifest


class _Part(BaseModel):
    """Base model that allows extra members."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Pixels(_Part):
    size: Annotated[int, Field(ge=1, le=4096)]
    mean: list[float]
    std: list[float]


class _Teacher(_Part):
    network: str
    weights: str
    preprocessing: _Pixels
    settings: str | None = None
    columns: list[Annotated[int, Field(ge=0, lt=1 << 48)] | None] | None = None
    imported: dict[str, Any] | None = None


class _View(_Part):
    fingerprint: str
    recipe: Annotated[ViewRecipe, Field(strict=False)]


class _Source(_Part):
    name: str
    fingerprint: str


PARTS: dict[str, type[_Part]] = {"teacher": _Teacher, "view": _View, "source": _Source}


def check_identity(identity: dict[str, Any], origin: dict[str, Any]) -> None:
    """Validate the parts of an identity that are present.

    Raises:
        ValueError: a part is not in the form that a writer produces; names the member.
    """
    if not isinstance(origin.get("weights_file"), str | None):
        raise ValueError(f"origin.weights_file is {origin['weights_file']!r:.80}, expected a file's name")
    if not isinstance(identity.get("precision", ""), str):
        raise ValueError(f"precision is {identity['precision']!r:.80}, expected its name")
    for name, part in PARTS.items():
        if name not in identity:
            continue
        try:
            part.model_validate(identity[name])
        except ValidationError as error:
            raise ValueError(f"{name}.{lines_of(part, error)[0]}") from None


def check_complete(manifest: Manifest, where: str) -> None:
    """Check that the identity has all of its parts.

    Raises:
        StoreDamaged: parts are missing; names them.
    """
    missing = [name for name in PARTS if name not in manifest.identity]
    if missing:
        raise StoreDamaged(
            f"the manifest of {where!r} does not say what the store's {' and '.join(missing)} was"
        )
