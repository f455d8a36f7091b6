"""What a manifest says of teacher, view and source, as far as commands read it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coursepack.data.views.recipe import ViewRecipe
from coursepack.errors import StoreDamaged

if TYPE_CHECKING:
    from coursepack.data.store.manifest import Manifest


class _Part(BaseModel):
    """A mapping that may hold more than is read of it."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Pixels(_Part):
    size: Annotated[int, Field(ge=1, le=4096)]
    mean: list[float]
    std: list[float]


class _Teacher(_Part):
    network: str
    weights: str
    preprocessing: _Pixels
    columns: list[Annotated[int, Field(ge=0, lt=1 << 48)]] | None = None


class _View(_Part):
    fingerprint: str
    recipe: Annotated[ViewRecipe, Field(strict=False)]


class _Source(_Part):
    name: str
    fingerprint: str


PARTS: dict[str, type[_Part]] = {"teacher": _Teacher, "view": _View, "source": _Source}


def check_identity(identity: dict[str, Any], origin: dict[str, Any]) -> None:
    """Refuse parts that cannot be what a writer wrote; a part may be absent.

    Raises:
        ValueError: says what is wrong.
    """
    if not isinstance(origin.get("weights_file"), str | None):
        raise ValueError(f"origin.weights_file is {origin['weights_file']!r:.80}, expected a file's name")
    for name, part in PARTS.items():
        if name not in identity:
            continue
        try:
            part.model_validate(identity[name])
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(map(str, (name, *problem["loc"])))
            raise ValueError(f"{place:.200}: {problem['msg']:.200}, got {problem['input']!r:.80}") from None


def check_complete(manifest: Manifest, where: str) -> None:
    """Refuse a store whose manifest leaves out its teacher or source.

    Raises:
        StoreDamaged: names what is missing.
    """
    missing = [name for name in PARTS if name not in manifest.identity]
    if missing:
        raise StoreDamaged(
            f"the manifest of {where!r} does not say what the store's {' and '.join(missing)} was"
        )
