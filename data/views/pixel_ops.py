"""Ops on rendered pixels: colors, blur and affine maps, applied with torchvision's functions.

`draw` returns integers for each sample; `apply` converts them to arguments of a torchvision v2 function and
calls it on one uint8 image. Lengths in pixels are given in the recipe's reference frame and scaled to the
rendered size.
"""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from coursepack.config import Config
from coursepack.data.randomness import below, between, chance
from coursepack.data.views.geometry import Pixels, Probability
from coursepack.data.views.params import GRID

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from coursepack.data.randomness import Draws, Words

Range = tuple[float, float]
Interpolation = Literal["nearest", "bilinear"]
Fill = Annotated[int, Field(ge=0, le=255)]


def on_grid(words: Words, bounds: Range) -> NDArray[np.int64]:
    """Map random words to uniformly distributed multiples of 2**-16 between the bounds."""
    low, high = (round(bound * GRID) for bound in bounds)
    return between(words, low, high)


def stack_columns(*values: NDArray[np.generic]) -> NDArray[np.int32]:
    """Stack the parameters of an op to `(N, P)` int32."""
    return np.stack([value.astype(np.int32) for value in values], axis=1)


def scaled(pixels: int, size: int, reference_size: int) -> int:
    """Convert a length in the reference frame to pixels of a rendered image, rounded half up."""
    return (2 * pixels * size + reference_size) // (2 * reference_size)


def _check_bounds(bounds: Range, name: str, low: float, high: float) -> None:
    if not low <= bounds[0] <= bounds[1] <= high:
        raise ValueError(f"{name} is {bounds}, expected {low:g} <= smallest <= largest <= {high:g}")


class ColorJitter(Config):
    """Change brightness, contrast, saturation and hue by random factors, in random order."""

    op: Literal["color_jitter"] = "color_jitter"
    brightness: Annotated[float, Field(ge=0, le=1024)] = 0.0
    """Factors are drawn from max(0, 1 - brightness) to 1 + brightness; contrast and saturation likewise."""
    contrast: Annotated[float, Field(ge=0, le=1024)] = 0.0
    saturation: Annotated[float, Field(ge=0, le=1024)] = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Shifts are drawn from -hue to hue, in turns of the color circle."""
    probability: Probability = 1.0

    def draw(self, draws: Draws, reference_size: int) -> NDArray[np.int32]:
        """Draw whether to apply the op, one of 24 orders, and the four factors."""
        first, second = np.split(draws.words(0, 2), 2, axis=1)
        strengths = (self.brightness, self.contrast, self.saturation)
        factors = [
            on_grid(second[:, k], (max(0.0, 1 - strength), 1 + strength))
            for k, strength in enumerate(strengths)
        ]
        hue = on_grid(second[:, 3], (-self.hue, self.hue))
        return stack_columns(chance(first[:, 0], self.probability), below(first[:, 1], 24), *factors, hue)

    def apply(self, image: Tensor, params: Sequence[int], reference_size: int) -> Tensor:
        """Change the colors of one image `(C, S, S)` uint8."""
        import torchvision.transforms.v2.functional as F

        active, order, *factors = params
        if not active:
            return image
        strengths = (self.brightness, self.contrast, self.saturation, self.hue)
        functions = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
        for index in list(permutations(range(4)))[order]:
            if strengths[index]:
                image = functions[index](image, factors[index] / GRID)
        return image


class Grayscale(Config):
    """Set all channels to the luminance."""

    op: Literal["grayscale"] = "grayscale"
    probability: Probability = 0.1

    def draw(self, draws: Draws, reference_size: int) -> NDArray[np.int32]:
        """Draw whether to apply the op."""
        return stack_columns(chance(draws.words()[:, 0], self.probability))

    def apply(self, image: Tensor, params: Sequence[int], reference_size: int) -> Tensor:
        """Convert one image `(C, S, S)` uint8 to gray."""
        import torchvision.transforms.v2.functional as F

        return F.rgb_to_grayscale(image, num_output_channels=len(image)) if params[0] else image


class Blur(Config):
    """Apply a Gaussian blur."""

    op: Literal["blur"] = "blur"
    kernel_size: Pixels = 23
    """Side of the kernel in pixels of the reference frame; odd."""
    sigma: Range = (0.1, 2.0)
    """Bounds of the standard deviation in pixels of the reference frame."""
    probability: Probability = 0.5

    @model_validator(mode="after")
    def _ranges(self) -> Blur:
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {self.kernel_size}, expected an odd number")
        if not 1 / GRID <= self.sigma[0] <= self.sigma[1] <= 1024:
            raise ValueError(f"sigma is {self.sigma}, expected 0 < smallest <= largest <= 1024")
        return self

    def draw(self, draws: Draws, reference_size: int) -> NDArray[np.int32]:
        """Draw whether to apply the op, and the standard deviation."""
        words = draws.words()
        return stack_columns(chance(words[:, 0], self.probability), on_grid(words[:, 1], self.sigma))

    def apply(self, image: Tensor, params: Sequence[int], reference_size: int) -> Tensor:
        """Blur one image `(C, S, S)` uint8; the kernel's radius is smaller than the image."""
        import torchvision.transforms.v2.functional as F

        if not params[0]:
            return image
        size = image.shape[-1]
        reach = min(scaled(self.kernel_size // 2, size, reference_size), size - 1)
        sigma = params[1] / GRID * size / reference_size
        return F.gaussian_blur(image, [2 * reach + 1] * 2, [sigma, sigma])


class Solarize(Config):
    """Invert all values from a threshold on."""

    op: Literal["solarize"] = "solarize"
    threshold: Annotated[int, Field(ge=0, le=255)] = 128
    probability: Probability = 0.5

    def draw(self, draws: Draws, reference_size: int) -> NDArray[np.int32]:
        """Draw whether to apply the op."""
        return stack_columns(chance(draws.words()[:, 0], self.probability))

    def apply(self, image: Tensor, params: Sequence[int], reference_size: int) -> Tensor:
        """Solarize one image `(C, S, S)` uint8."""
        import torchvision.transforms.v2.functional as F

        return F.solarize(image, float(self.threshold)) if params[0] else image


class Posterize(Config):
    """Keep the highest bits of every value."""

    op: Literal["posterize"] = "posterize"
    bits: Annotated[int, Field(ge=0, le=8)] = 4
    probability: Probability = 0.5

    def draw(self, draws: Draws, reference_size: int) -> NDArray[np.int32]:
        """Draw whether to apply the op."""
        return stack_columns(chance(draws.words()[:, 0], self.probability))

    def apply(self, image: Tensor, params: Sequence[int], reference_size: int) -> Tensor:
        """Posterize one image `(C, S, S)` uint8."""
        import torchvision.transforms.v2.functional as F

        return F.posterize(image, self.bits) if params[0] else image


class Rotation(Config):
    """Rotate about the center."""

    op: Literal["rotation"] = "rotation"
    degrees: Annotated[float, Field(ge=0, le=180)]
    """Angles are drawn from -degrees to degrees."""
    interpolation: Interpolation = "bilinear"
    fill: Fill = 0
    """Value of pixels outside the image."""

    def draw(self, draws: Draws, reference_size: int) -> NDArray[np.int32]:
        """Draw the angle in 2**-16 degrees."""
        return stack_columns(on_grid(draws.words()[:, 0], (-self.degrees, self.degrees)))

    def apply(self, image: Tensor, params: Sequence[int], reference_size: int) -> Tensor:
        """Rotate one image `(C, S, S)` uint8."""
        import torchvision.transforms.v2.functional as F

        mode = F.InterpolationMode(self.interpolation)
        return F.rotate(image, params[0] / GRID, interpolation=mode, fill=[float(self.fill)])


class Affine(Config):
    """Rotate, shift, scale and shear about the center."""

    op: Literal["affine"] = "affine"
    degrees: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Angles are drawn from -degrees to degrees."""
    translate: tuple[Probability, Probability] = (0.0, 0.0)
    """Largest shifts to the right and down, as shares of the side; rounded to pixels when rendered."""
    scale: Range = (1.0, 1.0)
    """Smallest and largest factor."""
    shear: tuple[Annotated[float, Field(ge=0, lt=90)], Annotated[float, Field(ge=0, lt=90)]] = (0.0, 0.0)
    """Largest angles along x and y, in degrees."""
    interpolation: Interpolation = "bilinear"
    fill: Fill = 0
    """Value of pixels outside the image."""

    @model_validator(mode="after")
    def _ranges(self) -> Affine:
        _check_bounds(self.scale, "scale", 1 / 1024, 1024)
        return self

    def draw(self, draws: Draws, reference_size: int) -> NDArray[np.int32]:
        """Draw angle, shifts, scale factor and shears in 2**-16."""
        first, second = np.split(draws.words(0, 2), 2, axis=1)
        shifts = [on_grid(first[:, 1 + k], (-limit, limit)) for k, limit in enumerate(self.translate)]
        shears = [on_grid(second[:, k], (-limit, limit)) for k, limit in enumerate(self.shear)]
        angle = on_grid(first[:, 0], (-self.degrees, self.degrees))
        return stack_columns(angle, *shifts, on_grid(first[:, 3], self.scale), *shears)

    def apply(self, image: Tensor, params: Sequence[int], reference_size: int) -> Tensor:
        """Transform one image `(C, S, S)` uint8."""
        import torchvision.transforms.v2.functional as F

        angle, right, down, factor, *shears = params
        size = image.shape[-1]
        return F.affine(
            image,
            angle=angle / GRID,
            translate=[scaled(right, size, GRID), scaled(down, size, GRID)],
            scale=factor / GRID,
            shear=[shear / GRID for shear in shears],
            interpolation=F.InterpolationMode(self.interpolation),
            fill=[float(self.fill)],
        )


PIXEL_OPS = (ColorJitter, Grayscale, Blur, Solarize, Posterize, Rotation, Affine)
