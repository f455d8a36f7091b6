"""View recipes: ops of a view in order, mixing and seed; presets, YAML files and fingerprints."""

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
from coursepack.data.views.recorded import Recorded
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
Op = Annotated[GeometryOp | PixelOp | Pipeline | Recorded, Field(discriminator="op")]


class ViewRecipe(Config):
    """Ordered list of ops, drawn independently for every (sample, view)."""

    ops: tuple[Op, ...] = ()
    """Ops in the order of application. Ops on geometry come before ops on rendered pixels."""
    mix: Mix | None = None
    """Mixing with another sample, after all ops."""
    reference_size: Annotated[int, Field(ge=1, le=4096)] = 32
    """Side in pixels of the reference frame, the unit of parameters that are lengths in pixels."""
    seed: Annotated[int, Field(ge=0, lt=1 << 64)] = 0
    """Seed of all draws."""

    @model_validator(mode="after")
    def _order(self) -> ViewRecipe:
        names = [op.op for op in self.ops]
        if "pipeline" in names and len(names) > 1:
            raise ValueError(
                f"ops are {names}: a pipeline must be the only op; include the other ops in the pipeline"
            )
        if "recorded" in names and (len(names) > 1 or self.mix is not None):
            raise ValueError(
                f"ops are {names}: recorded views must be the only op, without mix, because the teacher's "
                "answers were recorded with them"
            )
        is_geometry = [isinstance(op, GEOMETRY_OPS) for op in self.ops]
        if sorted(is_geometry, reverse=True) != is_geometry:
            raise ValueError(
                f"ops are {names}: move crops, resizes and flips before all other ops, because the "
                "source is resampled only once"
            )
        return self

    @property
    def geometry_ops(self) -> tuple[GeometryOp, ...]:
        """Ops on geometry: crops, resizes and flips."""
        return tuple(op for op in self.ops if isinstance(op, GEOMETRY_OPS))

    @property
    def filters_before_cropping(self) -> bool:
        """True if crops are taken from a resized image, as in `eval`.

        The resampling filter then reads pixels beyond the crop's edge.
        """
        return any(isinstance(op, Resize) for op in self.ops) and not any(
            isinstance(op, (PadCrop, ResizedCrop)) for op in self.ops
        )

    @property
    def pixel_ops(self) -> tuple[PixelOp, ...]:
        """Ops on rendered pixels."""
        return tuple(op for op in self.ops if not isinstance(op, (*GEOMETRY_OPS, Pipeline, Recorded)))

    @property
    def pipeline(self) -> Pipeline | None:
        """The user's own pipeline, if the view is one."""
        return self.ops[0] if self.ops and isinstance(self.ops[0], Pipeline) else None

    @property
    def recorded(self) -> Recorded | None:
        """The op that replays recorded crops and flips, if the view is one."""
        return self.ops[0] if self.ops and isinstance(self.ops[0], Recorded) else None

    @property
    def is_fixed(self) -> bool:
        """True if nothing is drawn at random, so that all views of a sample have the same pixels."""
        return self.mix is None and all(
            isinstance(op, (Resize, CenterCrop))
            or (isinstance(op, (HorizontalFlip, VerticalFlip)) and op.probability in (0, 1))
            for op in self.ops
        )

    def located(self, store: str) -> ViewRecipe:
        """Return the recipe with recorded parameters, if it has any, read from a store."""
        if self.recorded is None:
            return self
        return self.model_copy(update={"ops": (self.recorded.model_copy(update={"store": store}),)})


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
    """Return a preset by name, or the recipe in a YAML file.

    Args:
        name: key in `PRESETS`, or a path that ends in .yaml or .yml.
        seed: replaces the recipe's seed.

    Raises:
        UnknownName: there is no such preset.
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
    """Return the view recipe in a store's manifest.

    Args:
        values: `identity["view"]["recipe"]` of the manifest.
        holder: description of the store for errors, such as `store 'cnn.zarr'`.
        trust_code: allow a pipeline named in the manifest to be imported and run.

    Raises:
        RecipeError: the values are not a view recipe.
        UntrustedCode: the recipe names a pipeline and `trust_code` is False.
    """
    recipe = parse_config(ViewRecipe, values, f"the view recipe of {holder}")
    if recipe.pipeline is not None:
        check_trusted(f"{KIND}:{recipe.pipeline.factory}", holder, trust_code=trust_code)
    return recipe


def view_fingerprint(recipe: ViewRecipe, source: Source) -> str:
    """Return the sha256 of everything that determines the views of all samples.

    Stores contain this fingerprint, and students check it.
    """
    return fingerprint({"recipe": recipe.model_dump(mode="json"), "source": source.fingerprint})
