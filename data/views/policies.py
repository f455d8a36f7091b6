"""Augmentation policies: sequences of simple steps, each with a kind and a magnitude.

Kinds, magnitudes and policies are those of torchvision's transforms v2 (0.26), whose functions are called.
Magnitudes are stored in 2**-16: lengths as shares of the side, all others in the unit of torchvision's
function.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from coursepack.config import Config
from coursepack.data import exact
from coursepack.data.randomness import below, chance
from coursepack.data.views.params import GRID
from coursepack.data.views.pixel_ops import Fill, Interpolation
from coursepack.data.views.policy_tables import AUTO_POLICIES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from coursepack.data.randomness import Draws, Words

KINDS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color",
    "contrast", "sharpness", "posterize", "solarize", "autocontrast", "equalize", "invert",
)  # fmt: skip
"""Kinds of steps. Their indices are stored: only append."""
UNSIGNED = frozenset({"identity", "posterize", "solarize", "autocontrast", "equalize", "invert"})
SKIP = KINDS.index("identity")


@dataclass(frozen=True)
class Strengths:
    """Magnitudes at the highest bin for each kind of step; they grow linearly from no effect."""

    shear: float
    """Tangent of the angle."""
    translate: float
    """Share of the side."""
    rotate: float
    """Degrees."""
    enhance: float
    """Distance from 1 of the factors of brightness, color, contrast and sharpness."""
    posterize: tuple[int, int]
    """Bits kept at the lowest bin, and the number of bits fewer at the highest."""

    def table(self, bins: int) -> NDArray[np.int64]:
        """Return the magnitudes in 2**-16 `(kinds, bins)`."""
        rise = np.arange(bins) / (bins - 1)
        bits, fewer = self.posterize
        rows = {
            **dict.fromkeys(("shear_x", "shear_y"), self.shear * rise),
            **dict.fromkeys(("translate_x", "translate_y"), self.translate * rise),
            "rotate": self.rotate * rise,
            **dict.fromkeys(("brightness", "color", "contrast", "sharpness"), self.enhance * rise),
            "posterize": np.rint(bits - fewer * rise),
            "solarize": 1 - rise,
        }
        values = np.zeros((len(KINDS), bins))
        for kind, row in rows.items():
            values[KINDS.index(kind)] = row
        return np.rint(values * GRID).astype(np.int64)


def take_step(image: Tensor, kind: int, magnitude: int, interpolation: Interpolation, fill: int) -> Tensor:
    """Apply one step to an image `(C, S, S)` uint8.

    Args:
        image: the image.
        kind: index in `KINDS`.
        magnitude: magnitude in 2**-16.
        interpolation: interpolation of steps that move pixels.
        fill: value of pixels outside the image.
    """
    import torchvision.transforms.v2.functional as F

    name, value = KINDS[kind], magnitude / GRID
    mode, background = F.InterpolationMode(interpolation), [float(fill)]
    match name:
        case "identity":
            return image
        case "shear_x" | "shear_y":
            degrees = math.degrees(math.atan(value))
            shear = [degrees, 0.0] if name == "shear_x" else [0.0, degrees]
            return F.affine(
                image, 0.0, [0, 0], 1.0, shear, interpolation=mode, fill=background, center=[0, 0]
            )
        case "translate_x" | "translate_y":
            # Truncated as in torchvision; half a grid step keeps exact pixel counts from being rounded down.
            pixels = (2 * abs(magnitude) + 1) * image.shape[-1] // (2 * GRID) * (1 if magnitude > 0 else -1)
            shift = [pixels, 0] if name == "translate_x" else [0, pixels]
            return F.affine(image, 0.0, shift, 1.0, [0.0, 0.0], interpolation=mode, fill=background)
        case "rotate":
            return F.rotate(image, value, interpolation=mode, fill=background)
        case "brightness":
            return F.adjust_brightness(image, 1 + value)
        case "color":
            return F.adjust_saturation(image, 1 + value)
        case "contrast":
            return F.adjust_contrast(image, 1 + value)
        case "sharpness":
            return F.adjust_sharpness(image, 1 + value)
        case "posterize":
            return F.posterize(image, round(value))
        case "solarize":
            return F.solarize(image, 255.0 * value)
        case "autocontrast":
            return F.autocontrast(image)
        case "equalize":
            return F.equalize(image)
        case "invert":
            return F.invert(image)
    raise ValueError(f"step is {kind}, expected 0 to {len(KINDS) - 1}")


def _signed(kinds: NDArray[np.int64], magnitudes: NDArray[np.int64], words: Words) -> NDArray[np.int64]:
    unsigned = np.isin(kinds, [KINDS.index(name) for name in UNSIGNED])
    return np.where(~unsigned & chance(words, 0.5), -magnitudes, magnitudes)


def _interleave(steps: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> NDArray[np.int32]:
    return np.stack([column for step in steps for column in step], axis=1).astype(np.int32)


class _Chain(Config):
    """Base of policies that apply steps in sequence. Parameters are alternating kinds and magnitudes."""

    interpolation: Interpolation = "nearest"
    """Interpolation of steps that move pixels."""
    fill: Fill = 0
    """Value of pixels outside the image."""

    def apply(self, image: Tensor, params: Sequence[int], reference_size: int) -> Tensor:
        """Apply all steps to one image `(C, S, S)` uint8."""
        for kind, magnitude in zip(params[::2], params[1::2], strict=True):
            image = take_step(image, kind, magnitude, self.interpolation, self.fill)
        return image


_MODERATE = Strengths(shear=0.3, translate=150 / 331, rotate=30.0, enhance=0.9, posterize=(8, 4))


class RandAugment(_Chain):
    """Apply steps of random kinds, all with the same magnitude (Cubuk et al. 2020)."""

    op: Literal["rand_augment"] = "rand_augment"
    num_ops: Annotated[int, Field(ge=1, le=16)] = 2
    """Number of steps."""
    magnitude: Annotated[int, Field(ge=0)] = 9
    """Magnitude bin, less than `num_magnitude_bins`."""
    num_magnitude_bins: Annotated[int, Field(ge=2, le=1024)] = 31

    @model_validator(mode="after")
    def _in_bins(self) -> RandAugment:
        if self.magnitude >= self.num_magnitude_bins:
            raise ValueError(
                f"magnitude is {self.magnitude}, expected less than num_magnitude_bins "
                f"({self.num_magnitude_bins})"
            )
        return self

    def draw(self, draws: Draws, reference_size: int) -> NDArray[np.int32]:
        """Draw kinds and signs."""
        table = _MODERATE.table(self.num_magnitude_bins)
        steps = []
        for step in range(self.num_ops):
            words = draws.words(step)
            kinds = below(words[:, 0], len(KINDS) - 1)  # all but invert
            steps.append((kinds, _signed(kinds, table[kinds, self.magnitude], words[:, 1])))
        return _interleave(steps)


class TrivialAugmentWide(_Chain):
    """Apply one step of random kind and magnitude (Müller and Hutter 2021)."""

    op: Literal["trivial_augment_wide"] = "trivial_augment_wide"
    num_magnitude_bins: Annotated[int, Field(ge=2, le=1024)] = 31

    def draw(self, draws: Draws, reference_size: int) -> NDArray[np.int32]:
        """Draw kind and magnitude. Shifts are up to 32 pixels of the reference frame."""
        strengths = Strengths(
            shear=0.99, translate=32 / reference_size, rotate=135.0, enhance=0.99, posterize=(8, 6)
        )
        words = draws.words()
        kinds = below(words[:, 0], len(KINDS) - 1)
        bins = below(words[:, 1], self.num_magnitude_bins)
        table = strengths.table(self.num_magnitude_bins)
        return _interleave([(kinds, _signed(kinds, table[kinds, bins], words[:, 2]))])


class AutoAugment(_Chain):
    """Apply one of 25 learned pairs of steps, each step with its own probability (Cubuk et al. 2019)."""

    op: Literal["auto_augment"] = "auto_augment"
    policy: Literal["imagenet", "cifar10", "svhn"] = "imagenet"
    """Data set on which the policy was learned."""

    def draw(self, draws: Draws, reference_size: int) -> NDArray[np.int32]:
        """Draw kinds and magnitudes of two steps; a skipped step is the identity."""
        pairs = AUTO_POLICIES[self.policy]
        table = _MODERATE.table(10)
        first = draws.words(0)
        chosen = below(first[:, 0], len(pairs))
        steps = []
        for index in range(2):
            words = draws.words(1 + index)
            kinds = np.array([KINDS.index(pair[index][0]) for pair in pairs])[chosen]
            bins = np.array([pair[index][2] for pair in pairs])[chosen]
            limits = np.array([round(pair[index][1] * 2**32) for pair in pairs], dtype=np.uint64)[chosen]
            taken = words[:, 0].astype(np.uint64) < limits
            magnitudes = _signed(kinds, table[kinds, bins], words[:, 1])
            steps.append((np.where(taken, kinds, SKIP), np.where(taken, magnitudes, 0)))
        return _interleave(steps)


class AugMix(Config):
    """Blend the image with several chains of random steps (Hendrycks et al. 2020).

    The chains' weights are drawn from a Dirichlet distribution with all parameters one, the share of the
    unchanged image uniformly from [0, 1]. Blending truncates, as torchvision's does.
    """

    op: Literal["aug_mix"] = "aug_mix"
    severity: Annotated[int, Field(ge=1, le=10)] = 3
    """Number of bins, out of ten, from which magnitudes are drawn."""
    mixture_width: Annotated[int, Field(ge=1, le=16)] = 3
    """Number of chains."""
    chain_depth: Annotated[int, Field(ge=-1, le=16)] = -1
    """Steps per chain; -1 draws one to three."""
    all_ops: bool = True
    """Include brightness, color, contrast and sharpness."""
    interpolation: Interpolation = "bilinear"
    """Interpolation of steps that move pixels."""
    fill: Fill = 0
    """Value of pixels outside the image."""

    @model_validator(mode="after")
    def _depth(self) -> AugMix:
        if self.chain_depth == 0:
            raise ValueError("chain_depth is 0, expected at least 1, or -1 to draw one to three")
        return self

    def draw(self, draws: Draws, reference_size: int) -> NDArray[np.int32]:
        """Draw the weights of image and chains in 2**-16, then kinds and magnitudes, chain by chain."""
        strengths = Strengths(shear=0.3, translate=1 / 3, rotate=30.0, enhance=0.9, posterize=(4, 4))
        table = strengths.table(10)
        excluded = {"identity", "invert"}
        if not self.all_ops:
            excluded |= {"brightness", "color", "contrast", "sharpness"}
        allowed = np.array([index for index, kind in enumerate(KINDS) if kind not in excluded])
        max_depth = self.chain_depth if self.chain_depth > 0 else 3
        image_share = draws.words(0)[:, 0] / 2.0**32
        chain_shares, steps = [], []
        for chain in range(self.mixture_width):
            words = draws.words(1 + chain)
            chain_shares.append(-exact.log((words[:, 0] + 1) / 2.0**32))
            depths = below(words[:, 1], 3) + 1 if self.chain_depth < 0 else max_depth
            for step in range(max_depth):
                words = draws.words(1 + self.mixture_width + chain * max_depth + step)
                kinds = allowed[below(words[:, 0], len(allowed))]
                magnitudes = _signed(kinds, table[kinds, below(words[:, 1], self.severity)], words[:, 2])
                taken = step < depths
                steps.append((np.where(taken, kinds, SKIP), np.where(taken, magnitudes, 0)))
        total = np.sum(chain_shares, axis=0)
        weights = [np.rint((1 - image_share) * share / total * GRID) for share in chain_shares]
        kept = GRID - np.sum(weights, axis=0)
        header = np.stack([kept, *weights], axis=1).astype(np.int32)
        return np.concatenate([header, _interleave(steps)], axis=1)

    def apply(self, image: Tensor, params: Sequence[int], reference_size: int) -> Tensor:
        """Blend one image `(C, S, S)` uint8 with its chains."""
        import torch

        weights, steps = params[: 1 + self.mixture_width], params[1 + self.mixture_width :]
        total = image.to(torch.int32) * weights[0]
        depth = len(steps) // self.mixture_width
        for chain, weight in enumerate(weights[1:]):
            changed = image
            chain_steps = steps[chain * depth : (chain + 1) * depth]
            for kind, magnitude in zip(chain_steps[::2], chain_steps[1::2], strict=True):
                changed = take_step(changed, kind, magnitude, self.interpolation, self.fill)
            total += changed.to(torch.int32) * weight
        return (total // GRID).to(torch.uint8)


POLICIES = (RandAugment, TrivialAugmentWide, AutoAugment, AugMix)
