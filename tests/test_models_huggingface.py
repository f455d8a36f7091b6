"""Networks of transformers: equal to the library's own pipeline, and what is refused."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import random_source
from published import KINDS, SIDE, TEN, change_json, images_of, write_published
from safetensors.torch import load_file, save_file

from coursepack.data import view_recipe
from coursepack.data.sources import InMemory
from coursepack.data.views import draw, render
from coursepack.errors import RecipeError, TeacherMismatch
from coursepack.models import Preprocessing, Tap, TeacherRunner, build_network, load_teacher
from coursepack.models.build import weights_fingerprint


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    return {kind: write_published(root / kind, kind) for kind in KINDS}


@pytest.fixture
def vit(folders, tmp_path):
    """A copy of a folder, to be changed."""
    return shutil.copytree(folders["vit"], tmp_path / "vit")


def pipeline(folder, images, **settings):
    """Logits of the library's own processor and model."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        return model(**processor(images=list(images), return_tensors="pt", **settings)).logits


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_the_librarys_pipeline(folders, kind):
    network = load_teacher(f"hf:{folders[kind]}", TEN)
    assert (network.preprocessing.size, network.class_names, network.columns) == (SIDE, TEN, None)
    images = images_of(5)
    ours = TeacherRunner(network).run(torch.from_numpy(images)).logits
    # Without the processor's own resizing and crop, which a view takes the place of.
    settings = {} if kind == "timm" else {"do_resize": False, "do_center_crop": False}
    theirs = pipeline(folders[kind], images, **settings)
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def smooth_images(count, size):
    """Images without detail that a resizing filter would treat in its own way."""
    rows = np.linspace(0, 2, size)
    waves = np.stack([np.sin(3 * rows + k)[:, None] * np.cos(2 * rows - k)[None] for k in range(3 * count)])
    return (
        (127.5 + 120 * waves)
        .round()
        .astype(np.uint8)
        .reshape(count, 3, size, size)
        .transpose(0, 2, 3, 1)
        .copy()
    )


def test_views_resize_as_the_processor_but_for_its_filter(folders):
    """Bilinear resizing to one side is the views'; other filters and crops are the recipe's to choose."""
    images = smooth_images(4, 80)
    source = InMemory("smooth", images, np.zeros(4, np.int64), TEN)
    samples = np.arange(4)
    recipe = view_recipe("none")
    pixels = render(recipe, source, samples, draw(recipe, source, samples, 0), SIDE)
    network = load_teacher(f"hf:{folders['vit']}", TEN)
    ours = TeacherRunner(network).run(torch.from_numpy(pixels)).logits
    theirs = pipeline(folders["vit"], images)
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    assert difference < 0.02, difference
