"""Training steps whose tensors are on a device that has no values, so that nothing can wait for them.

torch's `meta` device takes every path that a GPU takes, except those that ask for CUDA by name, and refuses
whatever needs a value: `item`, `bool`, `nonzero`, masks as indices. `Waits` adds copies that would wait.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")
READS = ("_local_scalar_dense", "masked_select", "nonzero", "unique", "_unique2", "bincount", "equal")
"""ATen calls whose result, or its shape, depends on values."""
COPIES = ("_to_copy", "copy_", "_copy_from")
FROM_VALUES = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)


class WaitsForTheDevice(AssertionError):
    """A call that would wait for the device."""


class Waits(TorchDispatchMode):
    """Raises for calls that would wait for the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").partition(".")[0]
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        there = any(tensor.device == META for tensor in tensors)
        if there and name in READS:
            raise WaitsForTheDevice(name)
        if name in ("index", "index_put_") and there and any(_is_mask(each) for each in args[1]):
            raise WaitsForTheDevice(f"{name} with a mask")
        result = function(*args, **(kwargs or {}))
        if name in COPIES and isinstance(result, torch.Tensor):
            devices = {tensor.device for tensor in (*tensors, result)}
            waits = not ((kwargs or {}).get("non_blocking") or args[2:3] == (True,))
            if META in devices and len(devices) > 1 and waits:
                raise WaitsForTheDevice(f"{name} between devices")
        return result


class Literals(TorchFunctionMode):
    """Raises for tensors that are made on the device from Python's numbers, which are copied there."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in FROM_VALUES and result.device == META:
            raise WaitsForTheDevice(f"{function.__name__} of numbers")
        return result


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) and index.ndim > 0


@contextlib.contextmanager
def unwaited(monkeypatch):
    """Let training run on `META`, which autocast and fused optimizers do not know."""
    autocast = torch.autocast

    def known(device_type, *args, **options):
        return autocast("cpu" if device_type == "meta" else device_type, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "autocast", known)
        for name in ("SGD", "AdamW"):
            kind = getattr(torch.optim, name)
            plain = kind.__init__
            patch.setattr(
                kind,
                "__init__",
                lambda *args, plain=plain, **options: plain(*args, **options | {"fused": False}),
            )
        yield
