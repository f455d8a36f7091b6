"""A user's own pipeline of torchvision transforms v2 as a view.

The pipeline draws from torch's global generator, which is seeded per (sample, view) for the call and restored
afterwards. As its draws are not known, the drift guard compares pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import field_validator

from coursepack.config import Config
from coursepack.errors import RecipeError
from coursepack.imports import import_object

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from coursepack.data.randomness import Draws


class Pipeline(Config):
    """View made by the transform that `factory(size)` returns, called with one uint8 image `(C, H, W)`."""

    op: Literal["pipeline"] = "pipeline"
    factory: str
    """`module:function`; takes the side in pixels, returns a transform to `(C, size, size)` uint8."""

    @field_validator("factory")
    @classmethod
    def _check_format(cls, factory: str) -> str:
        module, _, name = factory.partition(":")
        if not (module and name):
            raise ValueError("expected module:function")
        return factory

    def draw(self, draws: Draws, reference_size: int) -> NDArray[np.int32]:
        """Draw the two words of a seed."""
        return draws.words()[:, :2].view(np.int32)

    def build(self, size: int) -> Callable[[Tensor], Tensor]:
        """Return the transform for a rendered size.

        Raises:
            RecipeError: there is no such module or function.
        """
        module, _, name = self.factory.partition(":")
        factory = import_object(module, name, f"view pipeline {self.factory!r}")
        transform: Callable[[Tensor], Tensor] = factory(size)
        return transform

    def render(
        self, images: Sequence[NDArray[np.uint8]], seeds: NDArray[np.int32], out: NDArray[np.uint8]
    ) -> None:
        """Apply the transform to each image `(H, W, C)` and write the results to `out (N, S, S, C)`.

        Raises:
            RecipeError: the transform returns another shape or type.
        """
        import torch
        from torchvision import tv_tensors

        size = out.shape[1]
        transform = self.build(size)
        with torch.random.fork_rng(devices=[]):
            for row, image in enumerate(images):
                low, high = (int(word) & 0xFFFFFFFF for word in seeds[row])
                torch.manual_seed(low | high << 32)
                tensor = tv_tensors.Image(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1))
                pixels = torch.as_tensor(transform(tensor))
                expected = (out.shape[3], size, size)
                if pixels.dtype != torch.uint8 or tuple(pixels.shape) != expected:
                    raise RecipeError(
                        f"view pipeline {self.factory!r} gives {str(pixels.dtype).removeprefix('torch.')} "
                        f"{tuple(pixels.shape)}, expected uint8 {expected}: leave out conversion to float "
                        "and normalization, which the networks do themselves"
                    )
                out[row] = pixels.permute(1, 2, 0).numpy()
