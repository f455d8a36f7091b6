"""Taps: activations of named layers, caught while a network runs and reduced to what is kept of them.

layer3              the output as it is
layer3:pooled       mean over places
layer3:attention    mean of squares over channels
layer3:gram         similarity of places (NST)
a+b:gram            flow between two layers (FSP)
bn2:sign            signs only
bn2:margin          max(t, margin of that batch normalisation) (OFD)
layer3:map:4        averaged to 4x4 first; any reduction takes a size
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
    """One thing to keep of a network's inside."""

    layers: tuple[str, ...]
    """Dotted names of submodules; two only for `gram`."""
    reduction: str = "map"
    size: int | None = None
    """Side in pixels to which maps are averaged first."""

    @property
    def name(self) -> str:
        """Its name in a store: without a colon, which not every file system takes."""
        layers = "+".join(self.layers)
        if self.reduction == "map" and self.size is None:
            return layers
        return f"{layers}@{self.reduction}{self.size or ''}"

    def reduce(self, outputs: Sequence[Tensor], margins: Tensor | None) -> Tensor:
        """What is kept of the layers' outputs, one `(N, C, H, W)` (or `(N, D)`) per layer."""
        if self.size is not None:
            outputs = [reductions.resized(output, self.size) for output in outputs]
        if len(outputs) == 2:
            return reductions.pair_gram(*outputs)
        if self.reduction == "margin" and margins is not None:
            return reductions.above_margin(outputs[0], margins)
        return reductions.REDUCTIONS[self.reduction](outputs[0])


def parse_tap(text: str) -> Tap:
    """The tap that a flag names: `LAYER[+LAYER][:REDUCTION[:SIZE]]`.

    Raises:
        UnknownName: no reduction of that name.
        RecipeError: a size that is no number, or two layers for something other than `gram`.
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
    """The tap that has this name in a store."""
    layers, _, reduction = name.partition("@")
    kept = reduction.rstrip("0123456789")
    size = reduction.removeprefix(kept)
    return Tap(tuple(layers.split("+")), kept or "map", int(size) if size else None)


def tap_margins(module: nn.Module, tap: Tap) -> Tensor | None:
    """Margins `(C,)` of a `margin` tap, from its batch normalisation; None for other taps.

    Raises:
        TeacherMismatch: the layer is no batch normalisation with weight and bias.
    """
    if tap.reduction != "margin":
        return None
    layer = module.get_submodule(tap.layers[0])
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if not isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)) or weight is None or bias is None:
        raise TeacherMismatch(
            f"tap {tap.name!r} needs a batch normalisation with weight and bias, but layer "
            f"{tap.layers[0]!r} is a {type(layer).__name__}: tap the one before the activation"
        )
    return reductions.margins(bias.detach(), weight.detach())


@contextmanager
def tapped(module: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the output of each named submodule on every forward pass inside the context.

    Args:
        module: the network.
        layers: dotted names of its submodules, as `named_modules` gives them.

    Yields:
        The latest output `(N, ...)` per layer; filled by the forward pass.

    Raises:
        UnknownName: no submodule of that name.
        TeacherMismatch: a submodule gives something other than one tensor.
    """
    modules = dict(module.named_modules())
    modules.pop("")
    caught: dict[str, Tensor] = {}
    handles = []
    for layer in layers:
        if layer not in modules:
            raise UnknownName("layer", layer, modules)

        def catch(_module: nn.Module, _inputs: Any, output: Any, layer: str = layer) -> None:
            if not isinstance(output, Tensor):
                raise TeacherMismatch(
                    f"layer {layer!r} gives a {type(output).__name__}, expected one tensor: tap another layer"
                )
            # A copy: the next layer may work in place, as torchvision's ReLUs do.
            caught[layer] = output.clone()

        handles.append(modules[layer].register_forward_hook(catch))
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()
