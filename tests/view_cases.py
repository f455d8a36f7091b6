"""Recipes that use every op, and sources of images of many sizes."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from coursepack.data import PRESETS, ViewRecipe
from coursepack.data.sources import InMemory
from coursepack.data.views import draw
from coursepack.data.views.mixing import Mix
from coursepack.data.views.recipe import GeometryOp, PixelOp

if TYPE_CHECKING:
    from coursepack.data.views import ViewParams

OPS: dict[str, tuple[dict[str, Any], ...]] = {
    "pad_crop": ({"padding": 3},),
    "resized_crop": ({}, {"scale": (0.3, 0.9), "ratio": (1.0, 2.5)}),
    "resize": ({"shorter": 40},),
    "center_crop": ({"size": 24}, {"size": 45}),
    "horizontal_flip": ({},),
    "vertical_flip": ({"probability": 0.3},),
    "color_jitter": (
        {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1},
        {"brightness": 2.0, "probability": 0.8},
    ),
    "grayscale": ({"probability": 0.4},),
    "blur": ({"kernel_size": 7}, {"sigma": (0.5, 0.5), "probability": 1.0}),
    "solarize": ({"threshold": 100},),
    "posterize": ({"bits": 3},),
    "rotation": ({"degrees": 40}, {"degrees": 90, "interpolation": "nearest", "fill": 9}),
    "affine": (
        {"degrees": 15, "translate": (0.1, 0.3), "scale": (0.8, 1.3), "shear": (10, 5)},
        {"translate": (0.5, 0.0), "interpolation": "nearest", "fill": 255},
    ),
    "rand_augment": ({}, {"num_ops": 3, "magnitude": 30, "interpolation": "bilinear", "fill": 128}),
    "trivial_augment_wide": ({}, {"num_magnitude_bins": 10}),
    "auto_augment": ({}, {"policy": "cifar10"}, {"policy": "svhn"}),
    "aug_mix": ({}, {"severity": 10, "mixture_width": 2, "chain_depth": 2, "all_ops": False}),
    "random_erasing": ({"probability": 0.8}, {"value": "noise", "ratio": (0.2, 0.7)}, {"value": 77}),
}
"""Op to the parameters that it is tried with."""

MIXES = {
    "mixup": Mix(mixup_alpha=0.2),
    "cutmix": Mix(cutmix_alpha=1.0),
    "switch": Mix(mixup_alpha=0.8, cutmix_alpha=0.3, cutmix_probability=0.4, probability=0.7),
}

OP_NAMES = tuple(
    model.model_fields["op"].default for union in (GeometryOp, PixelOp) for model in get_args(union)
)
"""Every op but the pipeline, which needs a module of the user's."""


def recipe_of(*ops: tuple[str, dict[str, Any]], **fields: Any) -> ViewRecipe:
    """A recipe of some ops."""
    return ViewRecipe.model_validate({"ops": [{"op": name, **options} for name, options in ops], **fields})


def only_op(name: str, /, **options: Any) -> Any:
    """An op by itself, checked."""
    return recipe_of((name, options)).ops[0]


RECIPES: dict[str, ViewRecipe] = {
    **PRESETS,
    **{
        f"{name} {number}": recipe_of((name, options), seed=number)
        for name, variants in OPS.items()
        for number, options in enumerate(variants)
    },
    **{name: ViewRecipe(mix=mix, seed=5) for name, mix in MIXES.items()},
    "crops of crops": recipe_of(
        ("resized_crop", {"scale": (0.5, 1.0)}),
        ("vertical_flip", {}),
        ("pad_crop", {"padding": 2}),
        ("horizontal_flip", {}),
        ("resize", {"shorter": 50}),
        ("center_crop", {"size": 48}),
        ("resized_crop", {"scale": (0.2, 0.6)}),
    ),
    "eight values": recipe_of(
        ("resized_crop", {}),
        ("horizontal_flip", {}),
        ("color_jitter", {"brightness": 0.4, "hue": 0.1}),
        ("random_erasing", {}),
        reference_size=224,
        seed=2**64 - 1,
    ),
}
"""Every preset, every op alone, every kind of mixing, and some together."""


@dataclass(frozen=True)
class Sized:
    """As much of a source as drawing looks at: sizes and the number of samples. Sides are 1 to 640 pixels."""

    count: int = 1 << 40
    fixed: tuple[int, int] | None = None
    """Height and width of all images; None: each its own."""
    fingerprint: str = "sized"

    @property
    def labels(self) -> range:
        """Only their number matters."""
        return range(self.count)

    def sizes(self, samples: np.ndarray) -> np.ndarray:
        """Height and width `(n, 2)`."""
        samples = np.asarray(samples)
        if self.fixed is not None:
            return np.broadcast_to(np.array(self.fixed, dtype=np.int32), (len(samples), 2))
        return np.stack([samples * 7919 % 640 + 1, samples * 104729 % 640 + 1], axis=1).astype(np.int32)


SIZED = Sized()


@dataclass(frozen=True)
class Ragged:
    """A source of images that differ in size, so that there is no one array of them."""

    images: tuple[np.ndarray, ...]
    """`(H, W, C)` each."""
    name: str = "ragged"
    in_memory = None
    fingerprint: str = "ragged"

    @property
    def labels(self) -> np.ndarray:
        """All zero."""
        return np.zeros(len(self.images), dtype=np.int64)

    @property
    def channels(self) -> int:
        """Channels of the pixels."""
        return int(self.images[0].shape[2])

    def sizes(self, samples: np.ndarray) -> np.ndarray:
        """Height and width `(n, 2)`."""
        return np.array([self.images[sample].shape[:2] for sample in samples], dtype=np.int32)

    def pixels(self, samples: np.ndarray) -> list[np.ndarray]:
        """Images `(H, W, C)` of the given samples."""
        return [self.images[sample] for sample in samples]


def noisy(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """An image of random pixels `(H, W, C)`."""
    return np.random.default_rng([seed, height, width]).integers(0, 256, (height, width, channels), np.uint8)


def smooth(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """An image of a few waves `(H, W, C)`, as a photograph has them."""
    rng = np.random.default_rng([seed, height, width])
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [
        sum(
            rng.uniform(0.2, 1) * np.cos(2 * np.pi * (a * y + b * x) + rng.uniform(0, 6))
            for a, b in rng.uniform(-4, 4, (6, 2))
        )
        for _ in range(channels)
    ]
    image = np.stack(waves, axis=2)
    return np.clip(128 + 50 * image, 0, 255).round().astype(np.uint8)


def one_image(image: np.ndarray) -> InMemory:
    """A source of one image `(H, W, C)`."""
    return InMemory("one:train", image[None], np.zeros(1, dtype=np.int64), ("thing",))


def arrays_of(params: ViewParams, prefix: str = "") -> dict[str, np.ndarray]:
    """Every array of drawn parameters by a name."""
    found = {f"{prefix}boxes": params.boxes}
    if params.flips is not None:
        found[f"{prefix}flips"] = params.flips
    found |= {f"{prefix}op {place}": values for place, values in enumerate(params.pixel_ops)}
    if params.mixing is not None:
        mixing = params.mixing
        for name in ("kinds", "partners", "shares"):
            found[f"mixing {name}"] = getattr(mixing, name)
        found["mixing boxes"] = mixing.boxes
        found |= arrays_of(mixing.params, "partner ")
    return found


@functools.cache
def drawn(name: str, view: int, count: int) -> dict[str, np.ndarray]:
    """What a recipe draws for the first samples of `SIZED`; not to be changed."""
    return arrays_of(draw(RECIPES[name], SIZED, np.arange(count), view))
