"""Teachers and stores that many tests read and none changes."""

import shutil

import pytest
from builders import write_store, write_teacher
from image_files import write_tree

NETWORKS = ("digits-mlp", "digits-cnn", "digits-resnet")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """A cache folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSEPACK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def teachers(tmp_path_factory):
    """Run folders of three digit teachers of different architectures."""
    folder = tmp_path_factory.mktemp("teachers")
    return [write_teacher(folder / name, name, seed=seed) for seed, name in enumerate(NETWORKS, start=1)]


@pytest.fixture(scope="session")
def stores(tmp_path_factory, teachers):
    """Their float32 stores, three views of the view preset `digits`."""
    folder = tmp_path_factory.mktemp("stores")
    return [write_store(folder / f"{teacher.name}.zarr", teacher, views=3) for teacher in teachers]


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache folder that is empty."""
    monkeypatch.setenv("COURSEPACK_CACHE", str(tmp_path / "cache" / "deep"))
    return tmp_path / "cache" / "deep"


@pytest.fixture
def tree(tmp_path):
    """An ImageFolder tree `train` of 9 PNG files of one size."""
    write_tree(tmp_path / "tree" / "train", ("ant", "bee", "cat"))
    return tmp_path / "tree"


@pytest.fixture
def store(written, tmp_path):
    """A copy, which a test may damage, of the store that its module wrote once as `written`."""
    shutil.copytree(written, tmp_path / "s.zarr")
    return tmp_path / "s.zarr"
