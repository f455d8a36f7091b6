"""Normalization of uint8 pixels to float32 images in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def normalize(pixels: Tensor, channel: Sequence[int], table: Tensor) -> Tensor:
    """Convert pixels to normalized images by a table of values for each channel.

    Args:
        pixels: `(N, H, W, C)` uint8.
        channel: for each channel of the images, the channel of the pixels it is read from.
        table: `(channels, 256)` float32 on the CPU or on the pixels' device, the normalized value of each
            pixel level.

    Returns:
        Images `(N, channels, H, W)` float32, the same on every device.
    """
    if pixels.device.type == "cpu":
        from coursepack.kernels.pixels.jit_normalize import look_up

        count, height, width, _ = pixels.shape
        out = torch.empty(count, len(channel), height, width, dtype=torch.float32, device="cpu")
        look_up(pixels.contiguous().numpy(), np.asarray(channel), table.numpy(), out.numpy())
        return out
    values = table.to(pixels.device)
    # Slices of pixels, because an index tensor would be copied to the device and waited for.
    planes = [values[c][pixels[..., k].int()] for c, k in enumerate(channel)]
    return torch.stack(planes, dim=1)
