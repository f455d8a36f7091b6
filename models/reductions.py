"""Reductions of a layer's activation to the values that a method needs.

All functions take feature maps `(N, C, H, W)` and return a tensor with one entry per sample. They are
differentiable, so a student's features can be reduced in the same way.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def resized(features: Tensor, size: int) -> Tensor:
    """Resize maps to `(N, C, size, size)` by adaptive average pooling; smaller maps repeat values."""
    _need_map("an output size", features)
    return F.adaptive_avg_pool2d(features, size)


def pooled(features: Tensor) -> Tensor:
    """Return the mean over spatial positions, `(N, C)`."""
    _need_map("pooled", features)
    return features.mean((2, 3))


def attention(features: Tensor) -> Tensor:
    """Return the mean of squares over channels, `(N, H * W)`, not normalized.

    Source: Zagoruyko and Komodakis 2017, with p = 2.
    """
    _need_map("attention", features)
    return features.square().mean(1).flatten(1)


def gram(features: Tensor) -> Tensor:
    """Return the similarity of spatial positions, `(N, H * W, H * W)`, for neuron selectivity transfer (NST).

    Each channel is scaled to unit length over its positions, and products are averaged over channels. The
    squared distance between a teacher's matrix and a student's is the loss of Huang and Wang 2017 (polynomial
    kernel, d = 2, c = 0).
    """
    _need_map("gram", features)
    flat = F.normalize(features.flatten(2), dim=2)
    return flat.transpose(1, 2) @ flat / flat.shape[1]


def pair_gram(first: Tensor, second: Tensor) -> Tensor:
    """Return the flow between two layers (FSP), `(N, C1, C2)`, as a mean over spatial positions.

    The larger map is average-pooled to the size of the smaller. Source: Yim et al. 2017, equation 1.
    """
    _need_map("gram", first)
    _need_map("gram", second)
    size = min(first.shape[2], second.shape[2])
    first, second = (F.adaptive_avg_pool2d(features, size).flatten(2) for features in (first, second))
    return first @ second.transpose(1, 2) / first.shape[2]


def sketch(features: Tensor, width: int, seed: int = 0) -> Tensor:
    """Return a random projection of each sample, `(N, width)`, that keeps inner products on average.

    Values get random signs and are dealt at random to `width` sums of equally many. With signs drawn anew,
    the product of two sketches has the mean `x . y` and a variance of at most
    `(|x|² |y|² + (x . y)² - 2 sum_i x_i² y_i²) / width`. The projection depends on the number of values, the
    width and the seed alone, so that teacher and student share it.

    Source: Weinberger et al. 2009, arXiv 0902.2206 (signed feature hashing), with sums of equally many.

    Raises:
        ValueError: a sample has no more than `width` values.
    """
    flat = features.flatten(1)
    values = flat.shape[1]
    if values <= width:
        raise ValueError(
            f"a sketch of {width} values needs more values than that, got {values}: leave it out"
        )
    order, signs = _projection(values, width, seed, flat.device)
    padded = F.pad(flat[:, order] * signs.to(flat.dtype), (0, -values % width))
    return padded.reshape(len(padded), -1, width).sum(1)


@functools.lru_cache(maxsize=16)
def _projection(values: int, width: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return an order of the values and their signs, from words of a counter-based generator."""
    words = np.random.Philox(key=[seed, values << 32 | width]).random_raw(2 * values)
    order = np.argsort(words[:values], kind="stable")
    signs = np.where(words[values:] >> np.uint64(63), np.float32(1), np.float32(-1))
    # Teachers run in inference mode, whose tensors a student's backward pass could not save.
    with torch.inference_mode(False):
        return torch.from_numpy(order).to(device), torch.from_numpy(signs).to(device)


def above_margin(features: Tensor, margins: Tensor) -> Tensor:
    """Return `max(features, margins)` with one margin per channel.

    Source: the target of Heo et al., ICCV 2019 (OFD), section 3.1.
    """
    return torch.maximum(features, margins.reshape(-1, *[1] * (features.ndim - 2)))


def margins(bias: Tensor, weight: Tensor) -> Tensor:
    """Return the expected value of a batch normalization's negative outputs per channel, `(C,)`.

    With mean mu = bias and deviation s = |weight|: `mu - s phi(mu / s) / Phi(-mu / s)`, or -3 s if the
    probability of a negative output is at most 0.001 (Heo et al., ICCV 2019, appendix).
    """
    mu, s = bias.double(), weight.double().abs().clamp_min(1e-12)
    below = 0.5 * torch.erfc(mu / s / math.sqrt(2))
    density = torch.exp(-0.5 * (mu / s) ** 2) / math.sqrt(2 * math.pi)
    expected = mu - s * density / below.clamp_min(1e-12)
    return torch.where(below > 0.001, expected, -3 * s).float()


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "map": lambda features: features,
    "pooled": pooled,
    "attention": attention,
    "gram": gram,
    "sign": lambda features: features,
}
"""Reductions of one layer by name. `margin` needs margins and a pair's `gram` two layers."""


def _need_map(name: str, features: Tensor) -> None:
    if features.ndim != 4:
        raise ValueError(f"{name} needs feature maps (N, C, H, W), got {tuple(features.shape)}")
