"""Learned and random policies: chains of simple steps, each a kind and a magnitude.

Kinds, magnitudes and policies are those of torchvision's transforms v2 (0.26), and its functions do the work.
A magnitude is kept in 2**-16: a length as a share of the side, everything else in the function's own unit.
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
"""Their places are stored: only add."""
UNSIGNED = frozenset({"identity", "posterize", "solarize", "autocontrast", "equalize", "invert"})
SKIP = KINDS.index("identity")


@dataclass(frozen=True)
class Strengths:
    """How strong each kind of step is at the highest bin; every scale is linear from no effect on."""

    shear: float
    """Tangent of the angle."""
    translate: float
    """Share of the side."""
    rotate: float
    """Degrees."""
    enhance: float
    """Distance from 1 of the factors of brightness, colour, contrast and sharpness."""
    posterize: tuple[int, int]
    """Bits kept at the lowest bin, and how many fewer at the highest."""

    def table(self, bins: int) -> NDArray[np.int64]:
        """Magnitudes in 2**-16 `(kinds, bins)`."""
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
    """One image `(C, S, S)` uint8 after one step.

    Args:
        image: the image.
        kind: a place in `KINDS`.
        magnitude: in 2**-16.
        interpolation: of steps that move pixels.
        fill: what comes in from outside.
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
            # Towards zero, as torchvision; half a step of the grid keeps a whole number of pixels whole.
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
    return np.stack([part for step in steps for part in step], axis=1).astype(np.int32)


class _Chain(Config):
    """Steps one after the other; parameters are kinds and magnitudes in turn."""

    interpolation: Interpolation = "nearest"
    """Of steps that move pixels."""
    fill: Fill = 0
    """What comes in from outside."""

    def apply(self, image: Tensor, params: Sequence[int], reference_size: int) -> Tensor:
        """One image `(C, S, S)` uint8 after all its steps."""
        for kind, magnitude in zip(params[::2], params[1::2], strict=True):
            image = take_step(image, kind, magnitude, self.interpolation, self.fill)
        return image


_MODERATE = Strengths(shear=0.3, translate=150 / 331, rotate=30.0, enhance=0.9, posterize=(8, 4))


class RandAugment(_Chain):
    """A few steps of random kinds, all of one magnitude (Cubuk et al. 2020)."""

    op: Literal["rand_augment"] = "rand_augment"
    num_ops: Annotated[int, Field(ge=1, le=16)] = 2
    """Steps."""
    magnitude: Annotated[int, Field(ge=0)] = 9
    """A bin of `num_magnitude_bins`."""
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
        """Kinds and magnitudes."""
        table = _MODERATE.table(self.num_magnitude_bins)
        steps = []
        for step in range(self.num_ops):
            words = draws.words(step)
            kinds = below(words[:, 0], len(KINDS) - 1)  # all but invert
            steps.append((kinds, _signed(kinds, table[kinds, self.magnitude], words[:, 1])))
        return _interleave(steps)


class TrivialAugmentWide(_Chain):
    """One step of a random kind and magnitude (Müller and Hutter 2021)."""

    op: Literal["trivial_augment_wide"] = "trivial_augment_wide"
    num_magnitude_bins: Annotated[int, Field(ge=2, le=1024)] = 31

    def draw(self, draws: Draws, reference_size: int) -> NDArray[np.int32]:
        """Kind and magnitude. Shifts are up to 32 pixels of the reference frame."""
        strengths = Strengths(
            shear=0.99, translate=32 / reference_size, rotate=135.0, enhance=0.99, posterize=(8, 6)
        )
        words = draws.words()
        kinds = below(words[:, 0], len(KINDS) - 1)
        places = below(words[:, 1], self.num_magnitude_bins)
        table = strengths.table(self.num_magnitude_bins)
        return _interleave([(kinds, _signed(kinds, table[kinds, places], words[:, 2]))])


class AutoAugment(_Chain):
    """One of 25 learned pairs of steps, each taken with its own probability (Cubuk et al. 2019)."""

    op: Literal["auto_augment"] = "auto_augment"
    policy: Literal["imagenet", "cifar10", "svhn"] = "imagenet"
    """The data set that it was learned on."""

    def draw(self, draws: Draws, reference_size: int) -> NDArray[np.int32]:
        """Kinds and magnitudes of two steps; a step not taken is the identity."""
        pairs = AUTO_POLICIES[self.policy]
        table = _MODERATE.table(10)
        first = draws.words(0)
        chosen = below(first[:, 0], len(pairs))
        steps = []
        for place in range(2):
            words = draws.words(1 + place)
            kinds = np.array([KINDS.index(pair[place][0]) for pair in pairs])[chosen]
            bins = np.array([pair[place][2] for pair in pairs])[chosen]
            limits = np.array([round(pair[place][1] * 2**32) for pair in pairs], dtype=np.uint64)[chosen]
            taken = words[:, 0].astype(np.uint64) < limits
            magnitudes = _signed(kinds, table[kinds, bins], words[:, 1])
            steps.append((np.where(taken, kinds, SKIP), np.where(taken, magnitudes, 0)))
        return _interleave(steps)


class AugMix(Config):
    """A random blend of the image with a few chains of steps (Hendrycks et al. 2020).

    Weights are drawn from a Dirichlet distribution with all parameters one, the share of the image itself
    evenly from [0, 1]. Blending truncates, as torchvision's does.
    """

    op: Literal["aug_mix"] = "aug_mix"
    severity: Annotated[int, Field(ge=1, le=10)] = 3
    """Magnitudes are drawn from this many of ten bins."""
    mixture_width: Annotated[int, Field(ge=1, le=16)] = 3
    """Chains."""
    chain_depth: Annotated[int, Field(ge=-1, le=16)] = -1
    """Steps of a chain; -1 draws one to three."""
    all_ops: bool = True
    """Also brightness, colour, contrast and sharpness."""
    interpolation: Interpolation = "bilinear"
    """Of steps that move pixels."""
    fill: Fill = 0
    """What comes in from outside."""

    @model_validator(mode="after")
    def _depth(self) -> AugMix:
        if self.chain_depth == 0:
            raise ValueError("chain_depth is 0, expected at least 1, or -1 to draw one to three")
        return self

    def draw(self, draws: Draws, reference_size: int) -> NDArray[np.int32]:
        """Weights of the image and of each chain in 2**-16, then kinds and magnitudes, chain by chain."""
        strengths = Strengths(shear=0.3, translate=1 / 3, rotate=30.0, enhance=0.9, posterize=(4, 4))
        table = strengths.table(10)
        left_out = {"identity", "invert"}
        if not self.all_ops:
            left_out |= {"brightness", "color", "contrast", "sharpness"}
        allowed = np.array([place for place, kind in enumerate(KINDS) if kind not in left_out])
        most = self.chain_depth if self.chain_depth > 0 else 3
        own = draws.words(0)[:, 0] / 2.0**32
        shares, steps = [], []
        for chain in range(self.mixture_width):
            words = draws.words(1 + chain)
            shares.append(-exact.log((words[:, 0] + 1) / 2.0**32))
            depths = below(words[:, 1], 3) + 1 if self.chain_depth < 0 else most
            for step in range(most):
                words = draws.words(1 + self.mixture_width + chain * most + step)
                kinds = allowed[below(words[:, 0], len(allowed))]
                magnitudes = _signed(kinds, table[kinds, below(words[:, 1], self.severity)], words[:, 2])
                taken = step < depths
                steps.append((np.where(taken, kinds, SKIP), np.where(taken, magnitudes, 0)))
        total = np.sum(shares, axis=0)
        weights = [np.rint((1 - own) * share / total * GRID) for share in shares]
        kept = GRID - np.sum(weights, axis=0)
        header = np.stack([kept, *weights], axis=1).astype(np.int32)
        return np.concatenate([header, _interleave(steps)], axis=1)

    def apply(self, image: Tensor, params: Sequence[int], reference_size: int) -> Tensor:
        """One image `(C, S, S)` uint8, blended with its chains."""
        import torch

        weights, steps = params[: 1 + self.mixture_width], params[1 + self.mixture_width :]
        total = image.to(torch.int32) * weights[0]
        depth = len(steps) // self.mixture_width
        for chain, weight in enumerate(weights[1:]):
            changed = image
            own = steps[chain * depth : (chain + 1) * depth]
            for kind, magnitude in zip(own[::2], own[1::2], strict=True):
                changed = take_step(changed, kind, magnitude, self.interpolation, self.fill)
            total += changed.to(torch.int32) * weight
        return (total // GRID).to(torch.uint8)


POLICIES = (RandAugment, TrivialAugmentWide, AutoAugment, AugMix)
