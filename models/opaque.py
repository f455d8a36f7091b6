"""Opaque networks: modules without layers that another library or an exported program runs.

Such a module has an attribute `opaque`, the name of what runs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coursepack.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coursepack.models.build import Network
    from coursepack.models.taps import Tap


def check_opaque(network: Network, taps: Sequence[Tap], precision: str, compiled: bool) -> None:
    """Check that nothing is asked of an opaque network that needs its layers; other networks pass.

    Args:
        network: the teacher.
        taps: features to return besides the logits.
        precision: precision of the forward pass.
        compiled: whether the network is to run through `torch.compile`.

    Raises:
        RecipeError: the network is opaque, and has taps, another precision than float32, or is compiled.
    """
    runs = getattr(network.module, "opaque", None)
    if not isinstance(runs, str):
        return
    where = f"teacher {network.spec!r} is run by {runs} as it was exported"
    if taps:
        raise RecipeError(
            f"{where} and has no layers to tap: leave --tap {taps[0].name} out, or give the network as hf:, "
            "timm:, torchvision: or python:"
        )
    if precision != "float32" or compiled:
        given = "--compile" if precision == "float32" else f"--precision {precision}"
        raise RecipeError(f"{where}, in float32: leave {given} out")
