"""IEEE float32 arithmetic, whatever torch's defaults allow.

By default torch lets cuDNN round the inputs of float32 convolutions and recurrent layers to tf32, ten bits of
mantissa, and a caller may have allowed tf32 or bfloat16 for matrix products. A store that says `float32` may
not depend on either.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

EXACT = ("ieee", "none")
"""Settings that compute in IEEE float32: `none` allows nothing else."""


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Compute float32 convolutions and products in IEEE float32, on CUDA devices and on the CPU.

    The settings are those of the process, `torch.backends...fp32_precision`, and are as before afterwards.
    Where one was made through the older `allow_tf32` or `set_float32_matmul_precision`, torch refuses to read
    it back within.
    """
    backends: Any = torch.backends
    general = backends.fp32_precision
    # cuDNN first: operations that follow it, as those that nobody has set do, need no setting of their own.
    settings = [backends.cudnn, backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    settings += [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
    changed = []
    try:
        for setting in settings:
            before = setting.fp32_precision
            if before not in EXACT or (setting is backends.cudnn and before == "none"):
                # A value that is the general one too is taken to follow it.
                changed.append((setting, "none" if before == general else before))
                setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, before in reversed(changed):
            setting.fp32_precision = before
