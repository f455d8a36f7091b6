"""Tiny published networks for tests, made on the spot by transformers, timm and onnx."""

from __future__ import annotations

import json

import numpy as np
import torch

SIDE = 32
TEN = tuple("0123456789")


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('trapped').touch()",))


def labels(names=TEN):
    """Members of a configuration that name its classes."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def images_of(count, *, size=SIDE, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _vit(names):
    import transformers as hf

    config = hf.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=SIDE,
        patch_size=8,
        **labels(names),
    )
    return hf.ViTForImageClassification(config), hf.ViTImageProcessor(size={"height": SIDE, "width": SIDE})


def _resnet(names):
    import transformers as hf

    config = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **labels(names)
    )
    processor = hf.ViTImageProcessor(
        size={"height": 40, "width": 40},
        crop_size={"height": SIDE, "width": SIDE},
        do_center_crop=True,
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.2, 0.25, 0.3],
    )
    return hf.ResNetForImageClassification(config), processor


def _convnext(names):
    import transformers as hf

    config = hf.ConvNextConfig(hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], **labels(names))
    processor = hf.ConvNextImageProcessor(size={"shortest_edge": SIDE}, crop_pct=0.875)
    return hf.ConvNextForImageClassification(config), processor


def _timm(names):
    import transformers as hf

    pixels = {"input_size": [3, SIDE, SIDE], "mean": [0.3] * 3, "std": [0.2] * 3, "crop_pct": 1.0}
    config = hf.TimmWrapperConfig(
        architecture="test_resnet",
        model_args={},
        pretrained_cfg={**pixels, "num_classes": len(names), "architecture": "test_resnet"},
        num_labels=len(names),
        **labels(names),
    )
    return hf.TimmWrapperForImageClassification(config), None


def hf_logging():
    from transformers.utils import logging

    return logging


KINDS = {"vit": _vit, "resnet": _resnet, "convnext": _convnext, "timm": _timm}


def write_published(folder, kind="vit", *, names=TEN, seed=0):
    """A folder that transformers' `save_pretrained` wrote."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model, processor = KINDS[kind](names)
        for name, value in model.named_parameters():
            if name.startswith("classifier") or name.endswith("fc.weight"):
                torch.nn.init.normal_(value)
            elif value.ndim == 1:  # the last norm of a residual block begins at zero
                torch.nn.init.uniform_(value, 0.5, 1.5)
    progress = hf_logging()
    progress.disable_progress_bar()
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder
