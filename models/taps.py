"""Taps: the activations of named layers, caught while a network runs."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from coursepack.errors import TeacherMismatch, UnknownName

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@contextmanager
def tapped(module: nn.Module, taps: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the output of each tapped submodule on every forward pass inside the context.

    Args:
        module: the network.
        taps: dotted names of its submodules, as `named_modules` gives them.

    Yields:
        The latest output `(N, ...)` per tap; filled by the forward pass.

    Raises:
        UnknownName: no submodule of that name.
        TeacherMismatch: a submodule gives something other than one tensor.
    """
    modules = dict(module.named_modules())
    modules.pop("")
    caught: dict[str, Tensor] = {}
    handles = []
    for tap in taps:
        if tap not in modules:
            raise UnknownName("tap", tap, modules)

        def catch(_module: nn.Module, _inputs: Any, output: Any, tap: str = tap) -> None:
            if not isinstance(output, Tensor):
                raise TeacherMismatch(
                    f"layer {tap!r} gives a {type(output).__name__}, expected one tensor: tap another layer"
                )
            # A copy: the next layer may work in place, as torchvision's ReLUs do.
            caught[tap] = output.clone()

        handles.append(modules[tap].register_forward_hook(catch))
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()
