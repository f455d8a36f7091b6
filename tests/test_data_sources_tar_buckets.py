"""Tar shards in a bucket: the same as in a folder, read by ranges of bytes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from image_files import write_tar
from tar_files import CLASSES, PNG, assert_same_samples, pixels_of, rewritten

from coursepack.data import batches, open_source, view_recipe
from coursepack.data.loading import Renderer
from coursepack.data.store.locations import open_bucket
from coursepack.errors import RecipeError, SourceError

pytestmark = pytest.mark.integration


def put(address, name, data):
    open_bucket(*address.split("://")).put(name, data)


@pytest.fixture
def remote(shards, home):
    """The shards of `shards` in a bucket."""
    address = f"{home}/deep/shards"
    for path in shards.iterdir():
        put(address, path.name, path.read_bytes())
    put(address, "other/s-9.tar", b"not matched")
    return address


PATTERNS = pytest.mark.parametrize("pattern", ["s-{0..2}.tar", "*.tar"])


@PATTERNS
def test_shards_in_a_bucket_are_those_of_a_folder(image_tree, shards, remote, pattern, own_cache):
    source = open_source(f"tar:{remote}/{pattern}")
    assert_same_samples(source, open_source("folder", image_tree))
    assert source.fingerprint == open_source("tar:s-*.tar", shards).fingerprint
    assert open_source(f"tar:{remote}/{pattern}-0.5").fingerprint == (
        open_source("tar:s-*.tar-0.5", shards).fingerprint
    )


@PATTERNS
@pytest.mark.parametrize("home", ["s3"], indirect=True)
def test_an_index_is_kept_and_neighbours_are_read_together(remote, pattern, own_cache, s3_server):
    open_source(f"tar:{remote}/{pattern}")
    s3_server.requests.clear()
    again = open_source(f"tar:{remote}/{pattern}")
    assert not [key for method, key in s3_server.requests if key.endswith(".tar")]
    again.pixels(np.arange(12))
    assert s3_server.requests["GET", "s-1.tar"] == 1


def test_shards_in_the_bucket_itself_with_class_names(home, tmp_path):
    address = home
    for key in "01":
        shard = write_tar(tmp_path / f"{key}.tar", [(f"{key}.png", PNG), (f"{key}.cls", b"bee")])
        put(address, shard.name, shard.read_bytes())
    put(address, "classes.json", json.dumps(CLASSES).encode())
    source = open_source(f"tar:{address}/{{0,1}}.tar")
    assert (source.labels.tolist(), source.class_names) == ([1, 1], CLASSES)


def test_a_worker_reads_a_bucket(image_tree, remote):
    recipe, order = view_recipe("cifar"), np.arange(12)[::-1].copy()
    found = []
    for source, workers in ((open_source("folder", image_tree), 0), (open_source(f"tar:{remote}/*.tar"), 1)):
        with Renderer(source, recipe, [8], workers=workers) as renderer:
            rendered = renderer.ahead(batches(source, recipe, order, views=[0], batch_size=4))
            found.append([batch.pixels(8).numpy() for batch in rendered])
    assert all(map(np.array_equal, *found))


def test_what_fails_in_a_bucket_is_named(remote, shards, capsys):
    source = open_source(f"tar:{remote}/s-*.tar")
    rewritten(shards / "s-1.tar", lambda members: members[::-1])
    put(remote, "s-1.tar", (shards / "s-1.tar").read_bytes())
    with pytest.raises(SourceError, match=rf"shard {remote}/s-1\.tar has changed since it was indexed"):
        pixels_of(source)
    assert open_source(f"tar:{remote}/s-*.tar").fingerprint != source.fingerprint
    assert f"1 shards have changed since they were indexed, and are indexed again: {remote}/s-1.tar" in (
        capsys.readouterr().err
    )
    with pytest.raises(SourceError, match=r"there is no shard 't-\*\.tar'; found other/s-9\.tar, s-0\.tar"):
        open_source(f"tar:{remote}/t-*.tar")
    scheme = remote.partition(":")[0]
    with pytest.raises(SourceError, match=f"cannot be read: {scheme}://no-such-bucket"):
        open_source(f"tar:{scheme}://no-such-bucket/a.tar")
    with pytest.raises(RecipeError, match=f"of a source is not {scheme}://"):
        open_source(f"tar:{scheme}://a.tar")
