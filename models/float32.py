"""Float32 arithmetic independent of torch's precision settings.

By default torch lets cuDNN round the inputs of float32 convolutions and recurrent layers to tf32, which has
ten bits of mantissa, and a caller may have enabled tf32 or bfloat16 for matrix products. Values in a store
whose precision is `float32` must not depend on these.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

IEEE = "ieee"
EXACT = (IEEE, "none")
"""Values of `fp32_precision` that compute in IEEE float32; `none` enables no reduced precision."""


@contextmanager
def float32_products(cuda: str = IEEE) -> Iterator[None]:
    """Compute float32 convolutions and matrix products in one precision: `cuda` on GPUs, IEEE on the CPU.

    The context changes the process-wide settings `torch.backends...fp32_precision` and restores them on exit.
    Inside it, torch refuses to read settings back through the older `allow_tf32` and
    `set_float32_matmul_precision` if they were made through those.

    Args:
        cuda: `ieee` or `tf32`.
    """
    backends: Any = torch.backends
    general = backends.fp32_precision
    # cuDNN comes first: its operations follow its setting unless they were set one by one.
    gpu = [backends.cudnn, backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    cpu = [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
    changed = []
    try:
        for setting, wanted in [*((each, cuda) for each in gpu), *((each, IEEE) for each in cpu)]:
            before = setting.fp32_precision
            accepted = EXACT if wanted == IEEE else (wanted,)
            if before not in accepted or (setting is backends.cudnn and before == "none"):
                # A value equal to the general setting is assumed to be inherited from it.
                changed.append((setting, "none" if before == general else before))
                setting.fp32_precision = wanted
        yield
    finally:
        for setting, before in reversed(changed):
            setting.fp32_precision = before
