"""A user's own torchvision pipeline as a view: seeded per (sample, view), and the world left as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import random_source
from hypothesis import given, settings
from hypothesis import strategies as st
from view_cases import Ragged, noisy

from coursepack.data import ViewRecipe, view_recipe
from coursepack.data.batches import batches
from coursepack.data.views import draw, render, view_fingerprint
from coursepack.data.views.mixing import Mix
from coursepack.data.views.pipeline import Pipeline
from coursepack.errors import RecipeError

MODULE = """
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

def crops(size):
    return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4)])

def noise(size):
    return lambda image: torch.randint(0, 256, (image.shape[0], size, size), dtype=torch.uint8)

def kind(size):
    return lambda image: torch.full((3, size, size), type(image).__name__ == "Image").to(torch.uint8)

def same(size):
    return lambda image: image

def floats(size):
    return v2.Compose([v2.Resize((size, size)), v2.ToDtype(torch.float32, scale=True)])

def wrong(size):
    return v2.Resize((size + 1, size))

def gray(size):
    return v2.Compose([v2.Resize((size, size)), v2.Grayscale(1)])

def refused(size):
    raise KeyError(size)
"""
SOURCE = random_source(40, size=24, channels=3)


@pytest.fixture(autouse=True, scope="module")
def module(tmp_path_factory):
    """The module on the path."""
    folder = tmp_path_factory.mktemp("pipelines")
    (folder / "my_own_views.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield


def recipe_of(name, **fields):
    return ViewRecipe(ops=(Pipeline(factory=f"my_own_views:{name}"),), **fields)


def rendered(name, samples, view=0, size=16, source=SOURCE, **fields):
    recipe = recipe_of(name, **fields)
    samples = np.asarray(samples)
    return render(recipe, source, samples, draw(recipe, source, samples, view), size)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 39), min_size=1, max_size=12), st.integers(1, 12), st.integers(0, 2**63))
def test_pixels_do_not_depend_on_batches_order_or_the_global_state(samples, batch_size, seed):
    whole = rendered("crops", np.arange(40), view=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        several = batches(SOURCE, recipe_of("crops"), np.array(samples), views=[3], batch_size=batch_size)
        found = np.concatenate([batch.pixels(16).numpy() for batch in several])
        assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(found, whole[samples])


def test_every_sample_view_and_seed_has_its_own_randomness():
    drawn = [rendered("noise", np.arange(40), view=view) for view in (0, 1)]
    drawn.append(rendered("noise", np.arange(40), seed=1))
    rows = {row.tobytes() for pixels in drawn for row in pixels}
    assert len(rows) == 120
    again = rendered("noise", [7, 7, 3], view=1)
    assert np.array_equal(again, drawn[1][[7, 7, 3]])
    assert abs(np.corrcoef(drawn[0].reshape(-1), drawn[1].reshape(-1))[0, 1]) < 0.03


def test_the_seed_is_the_one_that_is_drawn():
    recipe, samples = recipe_of("noise"), np.arange(5)
    params = draw(recipe, SOURCE, samples, 2)
    found = render(recipe, SOURCE, samples, params, 9)
    for row, words in enumerate(params.pixel_ops[0].view(np.uint32).astype(object)):
        generator = torch.Generator().manual_seed(int(words[0] | words[1] << 32))
        expected = torch.randint(0, 256, (3, 9, 9), dtype=torch.uint8, generator=generator)
        assert np.array_equal(found[row], expected.permute(1, 2, 0).numpy())


def test_the_global_state_is_left_even_when_the_pipeline_fails():
    before = torch.get_rng_state()
    rendered("noise", [1, 2])
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(RecipeError):
        rendered("floats", [1, 2])
    assert torch.equal(torch.get_rng_state(), before)


def test_it_is_given_the_whole_image_as_torchvision_knows_it():
    assert (rendered("kind", [0, 1]) == 1).all()
    assert np.array_equal(rendered("same", np.arange(40), size=24), SOURCE.images)
    images = tuple(noisy(height, 31 - height) for height in (9, 14, 22))
    sizes = rendered("crops", np.arange(3), source=Ragged(images))
    assert sizes.shape == (3, 16, 16, 3)
    gray = random_source(4, channels=1)
    assert rendered("noise", np.arange(4), source=gray).shape == (4, 16, 16, 1)


def test_a_pipeline_can_be_mixed():
    fields = {"mix": Mix(cutmix_alpha=1.0)}
    recipe, samples = recipe_of("crops", **fields), np.arange(20)
    params = draw(recipe, SOURCE, samples, 0)
    found = rendered("crops", samples, **fields)
    plain = rendered("crops", np.arange(40))
    partners = plain[params.mixing.partners]
    assert ((found == plain[:20]) | (found == partners)).all()
    assert not np.array_equal(found, plain[:20])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("floats", r"'my_own_views:floats' gives float32 \(3, 16, 16\), expected uint8 \(3, 16, 16\): leave"),
        ("wrong", r"gives uint8 \(3, 17, 16\), expected uint8 \(3, 16, 16\)"),
        ("gray", r"gives uint8 \(1, 16, 16\), expected uint8 \(3, 16, 16\)"),
        ("same", r"gives uint8 \(3, 24, 24\), expected uint8 \(3, 16, 16\)"),
        ("none", r"'my_own_views:none': module 'my_own_views' has no 'none'"),
    ],
)
def test_other_shapes_types_and_functions_are_refused(name, text):
    with pytest.raises(RecipeError, match=text):
        rendered(name, [0])


def test_missing_modules_are_refused_and_the_users_own_errors_are_not_hidden():
    recipe = ViewRecipe(ops=(Pipeline(factory="no_such_views:a"),))
    samples = np.array([0])
    with pytest.raises(RecipeError, match=r"'no_such_views:a': cannot import 'no_such_views': .*PYTHONPATH"):
        render(recipe, SOURCE, samples, draw(recipe, SOURCE, samples, 0), 8)
    with pytest.raises(KeyError):
        rendered("refused", [0])


@pytest.mark.parametrize("factory", ["module", ":function", "module:", ""])
def test_factories_are_spelled_module_function(factory):
    with pytest.raises(ValueError, match="expected module:function"):
        Pipeline(factory=factory)


def test_recipe_files_and_fingerprints_name_the_factory(tmp_path):
    file = tmp_path / "view.yaml"
    file.write_text("seed: 3\nops:\n- {op: pipeline, factory: 'my_own_views:crops'}\n")
    assert view_recipe(str(file)) == recipe_of("crops", seed=3)
    prints = {view_fingerprint(recipe_of(name), SOURCE) for name in ("crops", "noise")}
    assert len(prints) == 2
