"""Image processors of transformers as `Preprocessing`.

A view recipe crops and resizes in place of the processor, so only the size of the images, their normalization
and the order of their channels are taken over. Every other setting that changes pixels is refused.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coursepack.errors import RecipeError
from coursepack.models.preprocessing import Preprocessing

if TYPE_CHECKING:
    from collections.abc import Mapping

KNOWN = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
"""Steps that views and `Preprocessing` carry out."""
REFUSED = ("rescale_offset", "include_top")
"""Settings that change values in ways that `Preprocessing` has no numbers for."""
COLOR = (51, 102, 204)
"""Color of the image that a processor is compared with `Preprocessing` on."""
TOLERANCE = 1e-5


def preprocessing_of(processor: Any, spec: str) -> Preprocessing:
    """Return the preprocessing that gives a network the same pixels as its image processor.

    Raises:
        RecipeError: a setting of the processor has no equivalent; the message names it.
    """
    settings: dict[str, Any] = processor.to_dict()
    timm = settings.get("data_config")
    preprocessing = _of_timm(timm, spec) if isinstance(timm, dict) else _of_settings(settings, spec)
    _compare(processor, preprocessing, spec)
    return preprocessing


def _of_timm(config: Mapping[str, Any], spec: str) -> Preprocessing:
    _, height, width = config["input_size"]
    return _preprocessing(_square(height, width, "input_size", spec), config["mean"], config["std"])


def _of_settings(settings: Mapping[str, Any], spec: str) -> Preprocessing:
    for name, value in settings.items():
        if value is True and (name in REFUSED or (name.startswith("do_") and name not in KNOWN)):
            raise _refusal(spec, name, value, "which has no equivalent here")
    factor = settings.get("rescale_factor", 1 / 255)
    if not settings.get("do_rescale", False):
        raise _refusal(spec, "do_rescale", False, "expected true: pixels are scaled to [0, 1]")
    if not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise _refusal(spec, "rescale_factor", factor, "expected 1/255")
    size = _size(settings, spec)
    if not settings.get("do_normalize", False):
        return _preprocessing(size, (0.0,) * 3, (1.0,) * 3)
    return _preprocessing(size, settings["image_mean"], settings["image_std"])


def _size(settings: Mapping[str, Any], spec: str) -> int:
    """Return the side of the images that leave the processor."""
    for step, name in (("do_center_crop", "crop_size"), ("do_resize", "size")):
        value = settings.get(name)
        if not settings.get(step, False) or value is None:
            continue
        if isinstance(value, int):
            return value
        values = dict(value)
        if values.get("height") is not None:
            return _square(values["height"], values.get("width"), name, spec)
        if values.get("shortest_edge") is not None and values.get("longest_edge") is None:
            return int(values["shortest_edge"])
        raise _refusal(spec, name, values, "expected one side in pixels")
    raise _refusal(spec, "do_resize", settings.get("do_resize"), "expected true, with one size of all images")


def _square(height: int, width: int | None, name: str, spec: str) -> int:
    if height != width:
        raise _refusal(spec, name, f"{height} x {width}", "but views are square")
    return int(height)


def _preprocessing(size: int, mean: Any, std: Any) -> Preprocessing:
    return Preprocessing(size=size, mean=tuple(map(float, mean)), std=tuple(map(float, std)))


def _compare(processor: Any, preprocessing: Preprocessing, spec: str) -> None:
    """Check on an image of one color, which no resizing changes, that both give the same values."""
    size = preprocessing.size
    pixels = np.broadcast_to(np.array(COLOR, np.uint8), (size, size, 3)).copy()
    try:
        given = torch.as_tensor(np.asarray(processor(images=[pixels], return_tensors="pt")["pixel_values"]))
    except Exception as error:
        raise RecipeError(
            f"network {spec!r}: its image processor {type(processor).__name__} cannot take an image of "
            f"{size} x {size} pixels: {type(error).__name__}: {error}"
        ) from error
    ours = preprocessing(torch.from_numpy(pixels)[None])
    if given.shape != ours.shape or not torch.allclose(given.float(), ours, atol=TOLERANCE):
        raise RecipeError(
            f"network {spec!r}: its image processor {type(processor).__name__} gives images "
            f"{tuple(given.shape)} that differ from size {size}, mean {preprocessing.mean} and std "
            f"{preprocessing.std}, so one of its settings has no equivalent here: export the network with "
            "its preprocessing to ONNX (onnx:FILE)"
        )


def _refusal(spec: str, name: str, value: object, expected: str) -> RecipeError:
    return RecipeError(
        f"network {spec!r}: its image processor has {name} = {value!r:.80}, {expected}. Change it in "
        "preprocessor_config.json if the network was trained without it, or export the network with its "
        "preprocessing to ONNX (onnx:FILE)"
    )
