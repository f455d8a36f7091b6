"""A frozen teacher at work: pixels in, logits and tapped features out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from coursepack.errors import NonFiniteOutput, RecipeError, TeacherMismatch
from coursepack.models.float32 import ieee_float32
from coursepack.models.hubs.python import logits_problem
from coursepack.models.taps import tap_margins, tapped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from coursepack.models.build import Network
    from coursepack.models.taps import Tap


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
    """Per tap's name `(N, ...)` float32."""

    def arrays(self) -> dict[str, Tensor]:
        """Everything by the name of its array in a store."""
        return {"logits": self.logits, **{f"features/{tap}": value for tap, value in self.features.items()}}


class TeacherRunner:
    """A teacher in evaluation mode, without gradients, on one device, in IEEE float32."""

    memory_layout = "contiguous"
    """Order of the images in memory, `(N, channels, H, W)`."""
    compiled = False
    """Whether the network runs through `torch.compile`."""

    def __init__(
        self,
        network: Network,
        taps: Sequence[Tap] = (),
        device: torch.device | None = None,
        columns: Sequence[int] | None = None,
    ) -> None:
        """Freeze the network.

        Args:
            network: the teacher.
            taps: what to keep of its inside.
            device: where it runs; None means the CPU.
            columns: for each class of the source the teacher's own class; None means they are the same.

        Raises:
            UnknownName: a tap of a layer that the network does not have.
            TeacherMismatch: a `margin` tap of something other than a batch normalisation.
        """
        self.network = network
        self.taps = tuple(taps)
        self.device = device or torch.device("cpu")
        self.columns = None if columns is None else tuple(columns)
        self._module = network.module.to(self.device).eval().requires_grad_(False)
        self._layers = sorted({layer for tap in self.taps for layer in tap.layers})
        with tapped(self._module, self._layers):
            pass
        self._margins = {tap: tap_margins(self._module, tap) for tap in self.taps}

    @torch.inference_mode()
    def run(self, pixels: Tensor) -> TeacherOutput:
        """Logits and features of rendered views, all from one forward pass.

        Args:
            pixels: `(N, size, size, channels)` uint8, at the size of the network's preprocessing.

        Raises:
            TeacherMismatch: the network gives another shape than `(N, C)`, never runs a tapped layer, or the
                layer's output cannot be reduced.
        """
        images = self.network.preprocessing(pixels.to(self.device, non_blocking=True))
        with tapped(self._module, self._layers) as outputs, ieee_float32():
            logits = self._module(images)
        if (problem := logits_problem(logits, (len(pixels), self.network.classes))) is not None:
            raise TeacherMismatch(f"teacher {self.network.spec!r} gives {problem}")
        if self.columns is not None:
            logits = logits[:, list(self.columns)]
        if unused := [layer for layer in self._layers if layer not in outputs]:
            raise TeacherMismatch(
                f"teacher {self.network.spec!r} never runs its layer {unused[0]!r}: tap another layer"
            )
        features = {}
        for tap in self.taps:
            try:
                kept = tap.reduce([outputs[layer].float() for layer in tap.layers], self._margins[tap])
            except ValueError as error:
                raise TeacherMismatch(f"tap {tap.name!r}: {error}") from error
            features[tap.name] = kept
        return TeacherOutput(logits.float(), features)

    def static(self) -> dict[str, Tensor]:
        """What belongs to the teacher and not to samples: its head's weights, and margins; float32, CPU."""
        kept = {}
        heads = [layer for layer in self._module.modules() if isinstance(layer, nn.Linear)]
        if heads and heads[-1].out_features == self.network.classes:
            rows = slice(None) if self.columns is None else list(self.columns)
            kept["head_weight"] = heads[-1].weight[rows]
            if heads[-1].bias is not None:
                kept["head_bias"] = heads[-1].bias[rows]
        for tap, margins in self._margins.items():
            if margins is not None:
                kept[tap.name] = margins
        return {name: value.detach().float().cpu().contiguous() for name, value in kept.items()}

    def check_weights(self) -> None:
        """Refuse weights that hold NaN or infinity.

        Raises:
            NonFiniteOutput: names the first of them.
        """
        for name, value in self._module.state_dict().items():
            if isinstance(value, torch.Tensor) and not bool(torch.isfinite(value).all()):
                raise NonFiniteOutput(
                    f"teacher {self.network.spec!r} has weights that are not finite, first {name!r}: give "
                    "others"
                )

    def row_shapes(self, channels: int) -> dict[str, tuple[int, ...]]:
        """Shape of one row of every array, by running one black image.

        Raises:
            TeacherMismatch: the network cannot take views of its size.
        """
        size = self.network.preprocessing.size
        try:
            output = self.run(torch.zeros(1, size, size, channels, dtype=torch.uint8))
        except (RuntimeError, AssertionError) as error:
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
