"""Formats in which a trained network leaves, one module per format.

Each file carries the network's card: its preprocessing, its class names and its training. A new format is a
module with the functions of `Format` and a row in `FORMATS`.
"""

from __future__ import annotations

from coursepack.models.export import huggingface, onnx, weights
from coursepack.models.export.base import Format as Format

FORMATS = {
    "safetensors": Format(
        suffix=".safetensors", check=weights.check, write=weights.write, reload=weights.reload
    ),
    "onnx": Format(suffix=".onnx", check=onnx.check, write=onnx.write, reload=onnx.reload),
    "hf": Format(suffix="", check=huggingface.check, write=huggingface.write, reload=huggingface.reload),
}
"""Formats by name."""
