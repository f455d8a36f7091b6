"""View recipes: the ops of a view, their order, the seed. Presets, files, fingerprints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from coursepack.canonical import fingerprint
from coursepack.config import Config, parse_config, read_yaml
from coursepack.data.views.erasing import RandomErasing
from coursepack.data.views.geometry import (
    GEOMETRY_OPS,
    CenterCrop,
    HorizontalFlip,
    PadCrop,
    Resize,
    ResizedCrop,
    VerticalFlip,
)
from coursepack.data.views.mixing import Mix
from coursepack.data.views.pipeline import Pipeline
from coursepack.data.views.pixel_ops import (
    Affine,
    Blur,
    ColorJitter,
    Grayscale,
    Posterize,
    Rotation,
    Solarize,
)
from coursepack.data.views.policies import AugMix, AutoAugment, RandAugment, TrivialAugmentWide
from coursepack.errors import UnknownName
from coursepack.imports import KIND, check_trusted

if TYPE_CHECKING:
    from coursepack.data.sources import Source

GeometryOp = PadCrop | ResizedCrop | Resize | CenterCrop | HorizontalFlip | VerticalFlip
PixelOp = (
    ColorJitter
    | Grayscale
    | Blur
    | Solarize
    | Posterize
    | Rotation
    | Affine
    | RandAugment
    | TrivialAugmentWide
    | AutoAugment
    | AugMix
    | RandomErasing
)
Op = Annotated[GeometryOp | PixelOp | Pipeline, Field(discriminator="op")]


class ViewRecipe(Config):
    """An ordered list of ops, drawn independently for every (sample, view)."""

    ops: tuple[Op, ...] = ()
    """Applied in order. Ops that choose what is seen come before those that change pixels."""
    mix: Mix | None = None
    """Mixing with another sample, after all ops."""
    reference_size: Annotated[int, Field(ge=1, le=4096)] = 32
    """Side in pixels of the frame in which pixel-unit parameters are meant."""
    seed: Annotated[int, Field(ge=0, lt=1 << 64)] = 0
    """Key of the generator."""

    @model_validator(mode="after")
    def _order(self) -> ViewRecipe:
        names = [op.op for op in self.ops]
        if "pipeline" in names and len(names) > 1:
            raise ValueError(f"ops are {names}: a pipeline stands alone, put the other ops into it")
        late = [isinstance(op, GEOMETRY_OPS) for op in self.ops]
        if sorted(late, reverse=True) != late:
            raise ValueError(
                f"ops are {names}: crops, resizes and flips come before ops that change pixels, because "
                "they are one resampling of the source"
            )
        return self

    @property
    def geometry_ops(self) -> tuple[GeometryOp, ...]:
        """Those that choose what is seen."""
        return tuple(op for op in self.ops if isinstance(op, GEOMETRY_OPS))

    @property
    def filters_before_cropping(self) -> bool:
        """Whether crops are of a resized image, as in `eval`: then a filter sees beyond the crop's edge."""
        return any(isinstance(op, Resize) for op in self.ops) and not any(
            isinstance(op, (PadCrop, ResizedCrop)) for op in self.ops
        )

    @property
    def pixel_ops(self) -> tuple[PixelOp, ...]:
        """Those that change rendered pixels."""
        return tuple(op for op in self.ops if not isinstance(op, (*GEOMETRY_OPS, Pipeline)))

    @property
    def pipeline(self) -> Pipeline | None:
        """The user's own pipeline, where that is the view."""
        return self.ops[0] if self.ops and isinstance(self.ops[0], Pipeline) else None


_CIFAR = (PadCrop(padding=4), HorizontalFlip())
_IMAGENET = (ResizedCrop(), HorizontalFlip())

PRESETS = {
    "none": ViewRecipe(),
    "eval": ViewRecipe(ops=(Resize(shorter=256), CenterCrop(size=224)), reference_size=224),
    "digits": ViewRecipe(ops=(PadCrop(padding=1),), reference_size=8),
    "cifar": ViewRecipe(ops=_CIFAR),
    "cifar-strong": ViewRecipe(
        ops=(*_CIFAR, AutoAugment(policy="cifar10"), RandomErasing(probability=0.25)),
        mix=Mix(cutmix_alpha=1.0, probability=0.5),
    ),
    "imagenet": ViewRecipe(ops=_IMAGENET, reference_size=224),
    "imagenet-strong": ViewRecipe(
        ops=(*_IMAGENET, RandAugment(), RandomErasing(probability=0.25, value="noise")),
        mix=Mix(mixup_alpha=0.8, cutmix_alpha=1.0),
        reference_size=224,
    ),
}


def view_recipe(name: str, seed: int | None = None) -> ViewRecipe:
    """A preset by name, or the recipe in a YAML file.

    Args:
        name: a name in `PRESETS`, or a path that ends in .yaml or .yml.
        seed: replaces the recipe's seed.

    Raises:
        UnknownName: no such preset.
        RecipeError: the file is not a view recipe.
    """
    if name.endswith((".yaml", ".yml")):
        recipe = parse_config(ViewRecipe, read_yaml(Path(name)), f"view recipe {name!r}")
    elif name in PRESETS:
        recipe = PRESETS[name]
    else:
        raise UnknownName("view", name, [*PRESETS, "a .yaml file"])
    if seed is None:
        return recipe
    return parse_config(ViewRecipe, recipe.model_dump() | {"seed": seed}, f"view {name!r} with --view-seed")


def stored_view(values: Any, holder: str, *, trust_code: bool) -> ViewRecipe:
    """The view recipe that a store's manifest holds.

    Args:
        values: `identity["view"]["recipe"]` of the manifest.
        holder: the store, for errors: `store 'cnn.zarr'`.
        trust_code: whether a pipeline that it names may be imported and run.

    Raises:
        RecipeError: the values are not a view recipe.
        UntrustedCode: it names a pipeline, and is not trusted.
    """
    recipe = parse_config(ViewRecipe, values, f"the view recipe of {holder}")
    if recipe.pipeline is not None:
        check_trusted(f"{KIND}:{recipe.pipeline.factory}", holder, trust_code=trust_code)
    return recipe


def view_fingerprint(recipe: ViewRecipe, source: Source) -> str:
    """sha256 of what determines every view of every sample; stores carry it and students check it."""
    return fingerprint({"recipe": recipe.model_dump(mode="json"), "source": source.fingerprint})
