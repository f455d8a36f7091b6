"""Inference of a frozen teacher: logits and tapped features of a batch of pixels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from coursepack.errors import NonFiniteOutput, TeacherMismatch
from coursepack.models.float32 import ieee_float32
from coursepack.models.logits import logits_problem
from coursepack.models.taps import tap_margins, tapped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from coursepack.models.build import Network
    from coursepack.models.taps import Tap


@dataclass(frozen=True)
class TeacherOutput:
    """Outputs of a teacher for one batch."""

    logits: Tensor
    """`(N, C)` float32."""
    features: dict[str, Tensor]
    """Reduced features `(N, ...)` float32, by the name of their tap."""

    def arrays(self) -> dict[str, Tensor]:
        """Return all outputs by the name of their array in a store."""
        return {"logits": self.logits, **{f"features/{tap}": value for tap, value in self.features.items()}}


class TeacherRunner:
    """Runs a frozen teacher on one device, in evaluation mode and in IEEE float32."""

    memory_layout = "contiguous"
    """Memory format of the images `(N, channels, H, W)`."""
    compiled = False
    """True if the network runs through `torch.compile`."""

    def __init__(
        self,
        network: Network,
        taps: Sequence[Tap] = (),
        device: torch.device | None = None,
        columns: Sequence[int] | None = None,
    ) -> None:
        """Move the network to the device and freeze it in place.

        Args:
            network: the teacher.
            taps: features to return besides the logits.
            device: defaults to the CPU.
            columns: index of the teacher's class for each class of the source. Defaults to the same classes
                in the same order.

        Raises:
            UnknownName: a tap names a layer that the network does not have.
            TeacherMismatch: a `margin` tap names a layer that is not a batch normalization.
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
        """Return logits and features of rendered views, computed in one forward pass.

        Args:
            pixels: `(N, size, size, channels)` uint8, at the size of the network's preprocessing.

        Raises:
            TeacherMismatch: the output is not logits `(N, C)`, the forward pass skips a tapped layer, or the
                layer's output cannot be reduced.
        """
        images = self.network.preprocessing(pixels.to(self.device, non_blocking=True))
        with tapped(self._module, self._layers) as outputs, ieee_float32():
            logits = self._module(images)
        if (problem := logits_problem(logits, (len(pixels), self.network.classes))) is not None:
            raise TeacherMismatch(f"teacher {self.network.spec!r} returns {problem}")
        if self.columns is not None:
            logits = logits[:, list(self.columns)]
        if unused := [layer for layer in self._layers if layer not in outputs]:
            raise TeacherMismatch(
                f"teacher {self.network.spec!r} never runs layer {unused[0]!r}: tap another layer"
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
        """Return the tensors that do not depend on samples, as float32 on the CPU.

        They are the weights of the last linear layer, if its outputs are the logits, as `head_weight`
        `(C, D)` and `head_bias` `(C,)`; and by the tap's name the margins `(C,)` of each `margin` tap, and
        the shape before the projection of each sketched tap.
        """
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
        for name, shape in self._shapes_before_sketches().items():
            kept[name] = torch.tensor(shape)
        return {name: value.detach().float().cpu().contiguous() for name, value in kept.items()}

    def _shapes_before_sketches(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of one row of each sketched tap before its projection, by the tap's name."""
        whole = {tap.name: replace(tap, sketch=None) for tap in self.taps if tap.sketch is not None}
        if not whole:
            return {}
        runner = TeacherRunner(self.network, list(whole.values()), self.device)
        shapes = runner.row_shapes(self.network.preprocessing.channels)
        return {name: shapes[f"features/{tap.name}"] for name, tap in whole.items()}

    def check_weights(self) -> None:
        """Check that all weights are finite.

        Raises:
            NonFiniteOutput: a weight is NaN or infinite; the message names the first tensor.
        """
        for name, value in self._module.state_dict().items():
            if isinstance(value, torch.Tensor) and not bool(torch.isfinite(value).all()):
                raise NonFiniteOutput(
                    f"teacher {self.network.spec!r} has weights that are not finite, first {name!r}: "
                    "give other weights"
                )

    def row_shapes(self, channels: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of one row of every array, found by running one black image.

        Args:
            channels: number of channels of the source's images.

        Raises:
            TeacherMismatch: the network fails on images of its preprocessing's size.
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


def check_finite(output: TeacherOutput, samples: Sequence[int], teacher: str) -> None:
    """Check that all outputs of a teacher for a batch are finite.

    Args:
        output: the teacher's outputs.
        samples: index of the sample of each row.
        teacher: spec of the teacher, for the error message.

    Raises:
        NonFiniteOutput: an output is NaN or infinite; the message names the first samples.
    """
    for name, value in output.arrays().items():
        bad = ~torch.isfinite(value).flatten(1).all(1)
        if bool(bad.any()):
            ids = [int(samples[row]) for row in bad.nonzero()[:, 0].tolist()]
            shown = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
            raise NonFiniteOutput(
                f"teacher {teacher!r} gives {name} that are not finite for {len(ids)} samples of a batch "
                f"({shown}): check its weights, its preprocessing and its precision"
            )
