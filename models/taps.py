"""Taps: named layers whose outputs are captured in a forward pass and reduced before they are stored.

layer3              output without a reduction
layer3:pooled       mean over positions
layer3:attention    mean of squares over channels
layer3:gram         similarity matrix of positions (NST)
a+b:gram            flow matrix between two layers (FSP)
bn2:sign            signs
bn2:margin          max(t, margin of the batch normalization) (OFD)
layer3:map:4        average-pooled to 4x4 first; every reduction accepts a size
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from coursepack.errors import RecipeError, TeacherMismatch, UnknownName
from coursepack.models import reductions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

KNOWN_REDUCTIONS = (*reductions.REDUCTIONS, "margin")


@dataclass(frozen=True)
class Tap:
    """A layer, or a pair of layers, with the reduction of its output."""

    layers: tuple[str, ...]
    """Dotted names of submodules: one, or two for `gram`."""
    reduction: str = "map"
    """One of `KNOWN_REDUCTIONS`."""
    size: int | None = None
    """Side in positions to which maps are average-pooled before the reduction; None keeps their size."""

    @property
    def name(self) -> str:
        """Name of the tap in a store; it contains no colon, because some file systems do not allow it."""
        layers = "+".join(self.layers)
        if self.reduction == "map" and self.size is None:
            return layers
        return f"{layers}@{self.reduction}{self.size or ''}"

    def reduce(self, outputs: Sequence[Tensor], margins: Tensor | None) -> Tensor:
        """Reduce the outputs of the tap's layers to the stored features `(N, ...)`.

        Args:
            outputs: one tensor `(N, C, H, W)` or `(N, D)` per layer.
            margins: margins `(C,)` of a `margin` tap, None for the others.

        Raises:
            ValueError: the reduction needs maps, and an output is not `(N, C, H, W)`.
        """
        if self.size is not None:
            outputs = [reductions.resized(output, self.size) for output in outputs]
        if len(outputs) == 2:
            return reductions.pair_gram(*outputs)
        if self.reduction == "margin" and margins is not None:
            return reductions.above_margin(outputs[0], margins)
        return reductions.REDUCTIONS[self.reduction](outputs[0])


def parse_tap(text: str) -> Tap:
    """Parse `LAYER[+LAYER][:REDUCTION[:SIZE]]`, the form of a tap in options and recipes.

    Raises:
        UnknownName: the reduction is not one of `KNOWN_REDUCTIONS`.
        RecipeError: the size is not a positive number, or two layers are given for a reduction other than
            `gram`.
    """
    names, *rest = text.split(":")
    reduction = rest[0] if rest else "map"
    if reduction not in KNOWN_REDUCTIONS:
        raise UnknownName("reduction", reduction, KNOWN_REDUCTIONS)
    if len(rest) > 2 or (len(rest) == 2 and not (rest[1].isdecimal() and int(rest[1]) > 0)):
        raise RecipeError(f"tap {text!r} is not LAYER[:REDUCTION[:SIZE]], as in layer3:attention:8")
    layers = tuple(names.split("+"))
    if len(layers) > 1 and (reduction != "gram" or len(layers) > 2):
        raise RecipeError(f"tap {text!r} names {len(layers)} layers: only `gram` takes two, as in a+b:gram")
    return Tap(layers, reduction, int(rest[1]) if len(rest) == 2 else None)


def tap_from_name(name: str) -> Tap:
    """Return the tap whose `name` in a store is given."""
    layers, _, reduction = name.partition("@")
    kept = reduction.rstrip("0123456789")
    size = reduction.removeprefix(kept)
    return Tap(tuple(layers.split("+")), kept or "map", int(size) if size else None)


def tap_margins(module: nn.Module, tap: Tap) -> Tensor | None:
    """Compute the margins `(C,)` of a `margin` tap from its batch normalization; return None for other taps.

    Raises:
        TeacherMismatch: the layer is not a batch normalization with weight and bias.
    """
    if tap.reduction != "margin":
        return None
    layer = module.get_submodule(tap.layers[0])
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if not isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)) or weight is None or bias is None:
        raise TeacherMismatch(
            f"tap {tap.name!r} needs a batch normalization with weight and bias, but layer "
            f"{tap.layers[0]!r} is a {type(layer).__name__}: tap the one before the activation"
        )
    return reductions.margins(bias.detach(), weight.detach())


@contextmanager
def tapped(module: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Capture the outputs of named submodules during forward passes inside the context.

    Args:
        module: the network.
        layers: dotted names of its submodules, as in `named_modules`.

    Yields:
        The latest output `(N, ...)` of each layer by its name, filled by the forward pass.

    Raises:
        UnknownName: there is no submodule of a name.
        TeacherMismatch: a submodule returns something other than one tensor.
    """
    modules = dict(module.named_modules())
    modules.pop("")
    outputs: dict[str, Tensor] = {}
    handles = []
    for layer in layers:
        if layer not in modules:
            raise UnknownName("layer", layer, modules)

        def capture(_module: nn.Module, _inputs: Any, output: Any, layer: str = layer) -> None:
            if not isinstance(output, Tensor):
                raise TeacherMismatch(
                    f"layer {layer!r} returns a {type(output).__name__}, expected one tensor: tap another"
                )
            # Copied, because the next layer may work in place, as torchvision's ReLUs do.
            outputs[layer] = output.clone()

        handles.append(modules[layer].register_forward_hook(capture))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
