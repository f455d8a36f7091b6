"""A frozen teacher at work: pixels in, logits and tapped features out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from coursepack.errors import NonFiniteOutput, RecipeError, TeacherMismatch
from coursepack.models.taps import tapped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from coursepack.models.build import Network


def pick_device(name: str) -> torch.device:
    """The device to run on: `cpu`, `cuda`, `cuda:1`, or `auto` for a CUDA device where there is one.

    Raises:
        RecipeError: another name, or `cuda` was asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise RecipeError(f"device is {name!r}, expected cpu, cuda, cuda:NUMBER or auto")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise RecipeError(f"device is {name!r}, but torch sees no CUDA device: use --device cpu")
    return torch.device(name)


@dataclass(frozen=True)
class TeacherOutput:
    """What a teacher says about a batch."""

    logits: Tensor
    """`(N, C)` float32."""
    features: dict[str, Tensor]
    """Per tap `(N, ...)` float32."""

    def arrays(self) -> dict[str, Tensor]:
        """Everything by the name of its array in a store."""
        return {"logits": self.logits, **{f"features/{tap}": value for tap, value in self.features.items()}}


class TeacherRunner:
    """A teacher in evaluation mode, without gradients, on one device."""

    def __init__(
        self, network: Network, taps: Sequence[str] = (), device: torch.device | None = None
    ) -> None:
        """Freeze the network.

        Raises:
            UnknownName: a tap that is no layer of the network.
        """
        self.network = network
        self.taps = tuple(taps)
        self.device = device or torch.device("cpu")
        self._module = network.module.to(self.device).eval().requires_grad_(False)
        with tapped(self._module, self.taps):
            pass

    @torch.inference_mode()
    def run(self, pixels: Tensor) -> TeacherOutput:
        """Logits and features of rendered views.

        Args:
            pixels: `(N, size, size, channels)` uint8, at the size of the network's preprocessing.

        Raises:
            TeacherMismatch: the network gives another shape than `(N, C)`, or never runs a tapped layer.
        """
        images = self.network.preprocessing(pixels.to(self.device, non_blocking=True))
        with tapped(self._module, self.taps) as features:
            logits = self._module(images)
        expected = (len(pixels), self.network.classes)
        if tuple(logits.shape) != expected:
            raise TeacherMismatch(
                f"teacher {self.network.spec!r} gives logits of shape {tuple(logits.shape)}, "
                f"expected {expected} (N, C)"
            )
        if unused := [tap for tap in self.taps if tap not in features]:
            raise TeacherMismatch(
                f"teacher {self.network.spec!r} never runs its layer {unused[0]!r}: tap another layer"
            )
        return TeacherOutput(logits.float(), {tap: features[tap].float() for tap in self.taps})

    def row_shapes(self, channels: int) -> dict[str, tuple[int, ...]]:
        """Shape of one row of every array, by running one black image.

        Raises:
            TeacherMismatch: the network cannot take views of its size.
        """
        size = self.network.preprocessing.size
        try:
            output = self.run(torch.zeros(1, size, size, channels, dtype=torch.uint8))
        except RuntimeError as error:
            raise TeacherMismatch(
                f"teacher {self.network.spec!r} cannot take views of {size} x {size} pixels: {error}. "
                "Choose another --size, or leave it out"
            ) from error
        return {name: tuple(value.shape[1:]) for name, value in output.arrays().items()}


def check_finite(output: TeacherOutput, samples: Sequence[int], who: str) -> None:
    """Refuse an answer that holds NaN or infinity.

    Raises:
        NonFiniteOutput: names the first samples.
    """
    for name, value in output.arrays().items():
        bad = ~torch.isfinite(value).flatten(1).all(1)
        if bool(bad.any()):
            ids = [int(samples[row]) for row in bad.nonzero()[:, 0].tolist()]
            shown = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
            raise NonFiniteOutput(
                f"teacher {who!r} gives {name} that are not finite for {len(ids)} samples of a batch "
                f"({shown}): check its weights, its preprocessing and its precision"
            )
