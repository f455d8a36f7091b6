"""Options that describe a teacher and what is stored of it, as YAML files of several commands name them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from coursepack.config import Config

Positive = Annotated[int, Field(ge=1)]


class TeacherOptions(Config):
    """Weights, pixels, classes, stored arrays and forward pass of a teacher."""

    weights: str | None = None
    """A .safetensors or .pt file, or a name of torchvision's or timm's."""
    size: Positive | None = None
    """Side in pixels of the rendered views. Defaults to the teacher's own."""
    mean: tuple[float, ...] | None = None
    """Mean per channel, of values in [0, 1]. Defaults to the teacher's own."""
    std: tuple[float, ...] | None = None
    """Standard deviation per channel. Defaults to the teacher's own."""
    classes: str | None = None
    """YAML class map: the teacher's class index for each class of the source, or `missing`."""
    taps: tuple[str, ...] = ()
    """Layers whose features are stored too, as `LAYER[:REDUCTION[:SIZE]]`."""
    encoding: str = "float16"
    """Encoding of logits."""
    feature_encoding: str = "float16"
    """Encoding of features."""
    precision: Literal["float32", "tf32", "float16", "bfloat16"] = "float32"
    """Precision of the forward pass."""
    channels_last: bool = False
    """Run the teacher in channels-last memory format."""
    compile: bool = False
    """Run the teacher through torch.compile."""
