"""Taps: named layers whose outputs are captured in a forward pass and reduced before they are stored.

layer3              output without a reduction
layer3:pooled       mean over positions
layer3:attention    mean of squares over channels
layer3:gram         similarity matrix of positions (NST)
a+b:gram            flow matrix between two layers (FSP)
bn2:sign            signs
bn2:margin          max(t, margin of the batch normalization) (OFD)
layer3:map:4        average-pooled to 4x4 first; every reduction accepts a size
layer3:sketch:1024  random projection to 1,024 values, after any reduction but sign and margin
a+b:gram:sketch:256 the same of a flow matrix
"""

from __future__ import annotations

import re
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from coursepack.errors import RecipeError, TeacherMismatch, UnknownName
from coursepack.models import reductions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

KNOWN_REDUCTIONS = (*reductions.REDUCTIONS, "margin")
SKETCH = "sketch"
VALUE_BY_VALUE = ("sign", "margin")
"""Reductions whose features are compared value by value, which a projection mixes."""


@dataclass(frozen=True)
class Tap:
    """A layer, or a pair of layers, with the reduction of its output."""

    layers: tuple[str, ...]
    """Dotted names of submodules: one, or two for `gram`."""
    reduction: str = "map"
    """One of `KNOWN_REDUCTIONS`."""
    size: int | None = None
    """Side in positions to which maps are average-pooled before the reduction; None keeps their size."""
    sketch: int | None = None
    """Number of values to which the reduced output is projected (`reductions.sketch`); None keeps all."""

    @property
    def name(self) -> str:
        """Name of the tap in a store; it contains no colon, because some file systems do not allow it."""
        return self._spelled("@", "")

    @property
    def text(self) -> str:
        """The tap as `parse_tap` reads it: `LAYER[+LAYER][:REDUCTION[:SIZE]][:sketch:VALUES]`."""
        return self._spelled(":", ":")

    def _spelled(self, mark: str, before_number: str) -> str:
        words = ["+".join(self.layers)]
        if self.reduction != "map" or self.size is not None:
            size = "" if self.size is None else f"{before_number}{self.size}"
            words.append(f"{self.reduction}{size}")
        if self.sketch is not None:
            words.append(f"{SKETCH}{before_number}{self.sketch}")
        return mark.join(words)

    def reduce(self, outputs: Sequence[Tensor], margins: Tensor | None) -> Tensor:
        """Reduce the outputs of the tap's layers to the stored features `(N, ...)`.

        Args:
            outputs: one tensor `(N, C, H, W)` or `(N, D)` per layer.
            margins: margins `(C,)` of a `margin` tap, None for the others.

        Raises:
            ValueError: the reduction needs maps, and an output is not `(N, C, H, W)`; or the sketch is no
                smaller than what it is made of.
        """
        reduced = self._reduced(outputs, margins)
        return reduced if self.sketch is None else reductions.sketch(reduced, self.sketch)

    def _reduced(self, outputs: Sequence[Tensor], margins: Tensor | None) -> Tensor:
        if self.size is not None:
            outputs = [reductions.resized(output, self.size) for output in outputs]
        if len(outputs) == 2:
            return reductions.pair_gram(*outputs)
        if self.reduction == "margin" and margins is not None:
            return reductions.above_margin(outputs[0], margins)
        return reductions.REDUCTIONS[self.reduction](outputs[0])


def parse_tap(text: str) -> Tap:
    """Parse `LAYER[+LAYER][:REDUCTION[:SIZE]][:sketch:VALUES]`, the form of a tap in options and recipes.

    Raises:
        UnknownName: the reduction is not one of `KNOWN_REDUCTIONS`.
        RecipeError: a size is not a positive number, two layers are given for a reduction other than `gram`,
            or a reduction whose values are compared one by one is sketched.
    """
    whole, mark, values = text.partition(f":{SKETCH}")
    if mark and not (values.startswith(":") and _is_size(values[1:])):
        raise RecipeError(
            f"tap {text!r} is not LAYER[:REDUCTION[:SIZE]]:sketch:VALUES, as in layer3:sketch:1024"
        )
    names, *rest = whole.split(":")
    reduction = rest[0] if rest else "map"
    if reduction not in KNOWN_REDUCTIONS:
        raise UnknownName("reduction", reduction, (*KNOWN_REDUCTIONS, SKETCH))
    if len(rest) > 2 or (len(rest) == 2 and not _is_size(rest[1])):
        raise RecipeError(f"tap {text!r} is not LAYER[:REDUCTION[:SIZE]], as in layer3:attention:8")
    layers = tuple(names.split("+"))
    if len(layers) > 1 and (reduction != "gram" or len(layers) > 2):
        raise RecipeError(f"tap {text!r} names {len(layers)} layers: only `gram` takes two, as in a+b:gram")
    if mark and reduction in VALUE_BY_VALUE:
        raise RecipeError(
            f"tap {text!r} projects a {reduction}, whose values are compared one by one: leave :sketch out"
        )
    size = int(rest[1]) if len(rest) == 2 else None
    return Tap(layers, reduction, size, int(values[1:]) if mark else None)


def _is_size(text: str) -> bool:
    return text.isdecimal() and int(text) > 0


def tap_from_name(name: str) -> Tap:
    """Return the tap whose `name` in a store is given."""
    layers, *words = name.split("@")
    numbered = [re.fullmatch(r"(.*?)([0-9]*)", word) for word in words]
    found = {match[1]: int(match[2]) if match[2] else None for match in numbered if match is not None}
    sketch = found.pop(SKETCH, None)
    reduction, size = next(iter(found.items()), ("map", None))
    return Tap(tuple(layers.split("+")), reduction, size, sketch)


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


_UNCHANGED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Layers whose outputs no later layer has changed in place, which therefore need no copy."""


@contextmanager
def tapped(module: nn.Module, layers: Sequence[str], *, shared: bool = False) -> Iterator[dict[str, Tensor]]:
    """Capture the outputs of named submodules during forward passes inside the context.

    Args:
        module: the network.
        layers: dotted names of its submodules, as in `named_modules`.
        shared: yield views instead of copies of the outputs that no later layer changed in place when the
            network last ran; for one forward pass per context.

    Yields:
        The latest output `(N, ...)` of each layer by its name, filled by the forward pass.

    Raises:
        UnknownName: there is no submodule of a name.
        TeacherMismatch: a submodule returns something other than one tensor.
        RecipeError: a shared output was changed in place.
    """
    modules = dict(module.named_modules())
    modules.pop("")
    outputs: dict[str, Tensor] = {}
    seen: list[tuple[str, Tensor, int]] = []
    handles = []
    for layer in layers:
        if layer not in modules:
            raise UnknownName("layer", layer, modules)

        def capture(own: nn.Module, _inputs: Any, output: Any, layer: str = layer) -> None:
            if not isinstance(output, Tensor):
                raise TeacherMismatch(
                    f"layer {layer!r} returns a {type(output).__name__}, expected one tensor: tap another"
                )
            is_shared = shared and own in _UNCHANGED and not output.is_inference()
            # Copied, because the next layer may work in place, as torchvision's ReLUs do. A view leaves the
            # graph as a copy does, so that gradients are summed in the same order.
            outputs[layer] = output.view_as(output) if is_shared else output.clone()
            if shared and not output.is_inference():
                seen.append((layer, output, output._version))

        handles.append(modules[layer].register_forward_hook(capture))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
    changed = {layer for layer, output, version in seen if output._version != version}
    for layer in dict.fromkeys(layer for layer, _, _ in seen):
        if layer not in changed:
            _UNCHANGED.add(modules[layer])
        elif modules[layer] in _UNCHANGED:
            _UNCHANGED.discard(modules[layer])
            raise RecipeError(
                f"a later layer changed the output of layer {layer!r} in place, as it did not in earlier "
                "steps, so what was read of it is lost: name another layer"
            )
