"""Inference of a frozen teacher: logits and tapped features of a batch of pixels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from coursepack.errors import NonFiniteOutput, OutOfMemory, TeacherMismatch
from coursepack.models.logits import logits_problem
from coursepack.models.opaque import check_opaque
from coursepack.models.precision import PRECISIONS, check_precision, computing_in, has_precision
from coursepack.models.taps import tap_margins, tapped

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from coursepack.models.build import Network
    from coursepack.models.taps import Tap

CPU_MEMORY = "DefaultCPUAllocator: "
"""Beginning of torch's error about memory on the CPU, which has no class of its own."""


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


Forward = Callable[[torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""Function from images `(N, channels, H, W)` to logits and the outputs of the tapped layers."""


class TeacherRunner:
    """Runs a frozen teacher on one device, in evaluation mode and in one precision."""

    def __init__(
        self,
        network: Network,
        taps: Sequence[Tap] = (),
        device: torch.device | None = None,
        columns: Sequence[int | None] | None = None,
        *,
        precision: str = "float32",
        channels_last: bool = False,
        compiled: bool = False,
    ) -> None:
        """Move the network to the device and freeze it in place.

        Args:
            network: the teacher.
            taps: features to return besides the logits.
            device: defaults to the CPU.
            columns: index of the teacher's class for each class of the source, None for one that it does not
                know and that is left out of the logits. Defaults to `network.columns`; None there means the
                same classes in the same order.
            precision: a name of `PRECISIONS`. `float32` is IEEE float32, whatever torch's settings are.
            channels_last: keep images and weights in channels-last memory format.
            compiled: run the network through `torch.compile`, for batches of one size.

        Raises:
            UnknownName: a tap names a layer that the network does not have, or there is no such precision.
            TeacherMismatch: a `margin` tap names a layer that is not a batch normalization.
            RecipeError: the device does not have the precision, or another library runs the network, whose
                layers and precision cannot be chosen.
        """
        check_opaque(network, taps, precision, compiled)
        self.network = network
        self.taps = tuple(taps)
        self.device = device or torch.device("cpu")
        check_precision(precision, self.device)
        columns = network.columns if columns is None else columns
        self.columns = None if columns is None else tuple(columns)
        self.precision = precision
        self.memory_layout = "channels_last" if channels_last else "contiguous"
        """Memory format of the images `(N, channels, H, W)`."""
        self.compiled = compiled
        """True if the network runs through `torch.compile`."""
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._module = network.module.to(self.device).eval().requires_grad_(False)
        if channels_last:
            self._module = self._module.to(memory_format=torch.channels_last)
        self._kept = None if columns is None else [column for column in columns if column is not None]
        self._columns = None if self._kept is None else torch.tensor(self._kept, device=self.device)
        self._layers = sorted({layer for tap in self.taps for layer in tap.layers})
        with tapped(self._module, self._layers):
            pass
        self._margins = {tap: tap_margins(self._module, tap) for tap in self.taps}
        self._forward = self._compiled_forward() if compiled else self._plain_forward

    def run(self, pixels: Tensor) -> TeacherOutput:
        """Return logits and features of rendered views, computed in one forward pass.

        Args:
            pixels: `(N, size, size, channels)` uint8, at the size of the network's preprocessing.

        Raises:
            TeacherMismatch: the output is not logits `(N, C)`, the forward pass skips a tapped layer, or the
                layer's output cannot be reduced.
            OutOfMemory: the device has too little memory for the batch.
        """
        return self._run(pixels, self._forward, self.precision)

    def run_float32(self, pixels: Tensor) -> TeacherOutput:
        """Return the outputs as `run` does, computed in float32 and not compiled."""
        return self._run(pixels, self._plain_forward, "float32")

    @torch.inference_mode()
    def _run(self, pixels: Tensor, forward: Forward, precision: str) -> TeacherOutput:
        with self._naming_memory(len(pixels)):
            images = self.network.preprocessing(pixels.to(self.device, non_blocking=True))
            with computing_in(precision, self.device):
                logits, outputs = forward(images.contiguous(memory_format=self._format))
            with computing_in("float32", self.device):
                return self._output(logits, outputs, len(pixels))

    def _output(self, logits: Tensor, outputs: dict[str, Tensor], rows: int) -> TeacherOutput:
        if (problem := logits_problem(logits, (rows, self.network.classes))) is not None:
            raise TeacherMismatch(f"teacher {self.network.spec!r} returns {problem}")
        if self._columns is not None:
            logits = logits[:, self._columns]
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

    def _plain_forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with tapped(self._module, self._layers) as outputs:
            return self._module(images), outputs

    def _compiled_forward(self) -> Forward:
        # torch.compile sees the hooks that are there when it first runs, so they stay as long as the runner.
        self._watching = tapped(self._module, self._layers)
        outputs = self._watching.__enter__()

        def forward(images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return self._module(images), dict(outputs)

        compiled: Forward = torch.compile(forward, dynamic=False)
        return compiled

    @contextmanager
    def _naming_memory(self, rows: int) -> Iterator[None]:
        """Turn torch's errors about memory into `OutOfMemory`."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and CPU_MEMORY not in str(error):
                raise
            advice = (
                f"give a smaller --batch-size, such as {rows // 2}" if rows > 1 else "use another --device"
            )
            raise OutOfMemory(
                f"teacher {self.network.spec!r} needs more memory than device {str(self.device)!r} has free "
                f"for a batch of {rows} images: {advice}"
            ) from error

    def static(self) -> dict[str, Tensor]:
        """Return the tensors that do not depend on samples, as float32 on the CPU; C counts known classes.

        They are the weights of the last linear layer, if its outputs are the logits, as `head_weight`
        `(C, D)` and `head_bias` `(C,)`; and by the tap's name the margins `(C,)` of each `margin` tap, and
        the shape before the projection of each sketched tap.
        """
        kept = {}
        heads = [layer for layer in self._module.modules() if isinstance(layer, nn.Linear)]
        if heads and heads[-1].out_features == self.network.classes:
            rows = slice(None) if self._kept is None else self._kept
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
            output = self.run_float32(torch.zeros(1, size, size, channels, dtype=torch.uint8))
        except (RuntimeError, AssertionError) as error:
            raise TeacherMismatch(
                f"teacher {self.network.spec!r} cannot take views of {size} x {size} pixels: {error}. "
                "Choose another --size, or leave it out"
            ) from error
        return {name: tuple(value.shape[1:]) for name, value in output.arrays().items()}


CHECK_ALL = "check its weights, its preprocessing and its precision"
"""Advice about outputs that are not finite."""


def check_finite(output: TeacherOutput, samples: Sequence[int], teacher: str) -> None:
    """Check that all outputs of a teacher for a batch are finite.

    Args:
        output: the teacher's outputs.
        samples: index of the sample of each row.
        teacher: spec of the teacher, for the error message.

    Raises:
        NonFiniteOutput: an output is NaN or infinite; the message names the first samples.
    """
    check_finite_rows(finite_rows(output.arrays()), samples, teacher)


def finite_rows(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return, for each array of outputs `(N, ...)`, whether all values of a row are finite, `(N,)` bool."""
    return {name: _finite_rows(value.flatten(1)) for name, value in arrays.items()}


def _finite_rows(values: Tensor) -> Tensor:
    if values.device.type == "cpu":
        # torch adds much faster than it tests every value. A sum that is finite has finite terms; one that
        # is not may have overflowed.
        finite = torch.isfinite(values.sum(1))
        if finite.all():
            return finite
    return torch.isfinite(values).all(1)


def check_finite_rows(
    finite: Mapping[str, Tensor], samples: Sequence[int], teacher: str, advice: str = CHECK_ALL
) -> None:
    """Check the result of `finite_rows`.

    Args:
        finite: flags `(N,)` bool by the name of the array.
        samples: index of the sample of each row.
        teacher: spec of the teacher, for the error message.
        advice: end of the error message.

    Raises:
        NonFiniteOutput: as `check_finite`.
    """
    for name, rows in finite.items():
        if not bool(rows.all()):
            ids = [int(samples[row]) for row in (~rows).nonzero()[:, 0].tolist()]
            shown = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
            raise NonFiniteOutput(
                f"teacher {teacher!r} gives {name} that are not finite for {len(ids)} samples of a batch "
                f"({shown}): {advice}"
            )


def advice_for(precision: str, device: torch.device) -> str:
    """Return what to do about outputs that are not finite in a precision, for `check_finite_rows`."""
    if PRECISIONS[precision] is None:
        return CHECK_ALL
    others = [other for other in PRECISIONS if other != precision and has_precision(other, device)]
    others.sort(key=lambda other: other == "float16")  # the smallest range
    return (
        f"values may exceed the range of {precision}; use --precision {' or '.join(others)}, and if they are "
        "still not finite, check its weights and its preprocessing"
    )
