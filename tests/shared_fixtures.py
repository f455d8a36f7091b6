"""Teachers and stores that many tests read and none changes, and what holds for every test."""

import gc
import importlib
import os
import pkgutil
import shutil
import signal
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from browsing import found_chromium, launched
from builders import write_known, write_store, write_teacher
from filelock import FileLock
from helpers import make_job
from image_files import write_tree
from tar_files import members_of, write_images, write_in_shards

from coursepack import kernels
from coursepack.data import PRESETS, Batch, open_source
from coursepack.distill.methods import METHODS
from coursepack.models import parse_tap
from coursepack.precompute import run_job

NETWORKS = ("digits-mlp", "digits-cnn", "digits-resnet")
THIRDS = ((0, 1, 2, 3), (3, 4, 5, 6), (0, 6, 7, 8, 9))
"""Classes that the teachers of the stores `thirds` know."""
TAPS = (
    ("hidden1", "hidden2"),
    ("conv2", "conv1+conv2:gram", "hidden"),
    ("layer1", "layer2:pooled", "layer2.0.bn1:margin"),
)
"""Layers of these whose features the stores `tapped` have."""


def pytest_collection_finish(session):
    """Keep the half million objects of imported libraries out of every later garbage collection."""
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # some libraries report what is left when the interpreter ends


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """A cache folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSEPACK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """One thread for torch here and in processes that tests start.

    Small layers on many threads mostly wait for each other. A test that wants more asks for them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # more are processes, each of which imports torch
        torch.set_num_threads(1)
        yield


SIGTERM_HANDLER = signal.getsignal(signal.SIGTERM)
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""Variables of torchrun, which some libraries set in this process; with them, runs take all cores."""


@pytest.fixture(autouse=True)
def process_put_back(one_thread):
    """Undo a test's threads of torch, variables of ranks, and `precompute run`'s handler of SIGTERM."""
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)
    yield
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, SIGTERM_HANDLER)


@pytest.fixture(scope="session")
def shared(tmp_path_factory, cache):
    """`shared(name, fill)`: a folder that `fill(folder)` filled once for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def filled(name, fill):
        folder, done = base / name, base / f"{name}.done"
        with FileLock(base / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return filled


@pytest.fixture(scope="session", autouse=True)
def compiled(shared):
    """Numba's kernels in its cache on disk, so that one worker compiles them and not each."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared("compiled", lambda _: compile_kernels())


def compile_kernels():
    for module in pkgutil.walk_packages(kernels.__path__, "coursepack.kernels."):
        if ".jit_" in module.name:
            importlib.import_module(module.name)
    source, samples = open_source("digits"), np.arange(4)
    for recipe in PRESETS.values():
        Batch(source, recipe, samples, samples).pixels(12)


@pytest.fixture(scope="session")
def teachers(shared):
    """Run folders of three digit teachers of different architectures."""

    def write(folder):
        for seed, name in enumerate(NETWORKS, start=1):
            write_teacher(folder / name, name, seed=seed)

    folder = shared("teachers", write)
    return [folder / name for name in NETWORKS]


@pytest.fixture(scope="session")
def stores(shared, teachers):
    """Their float32 stores, three views of the view preset `digits`."""

    def write(folder):
        for teacher in teachers:
            write_store(folder / f"{teacher.name}.zarr", teacher, views=3)

    folder = shared("stores", write)
    return [folder / f"{teacher.name}.zarr" for teacher in teachers]


@pytest.fixture(scope="session")
def teacher(shared):
    """Run folder of a `digits-mlp` teacher."""
    return shared("mlp", lambda folder: write_teacher(folder / "mlp", "digits-mlp")) / "mlp"


@pytest.fixture(scope="session")
def cnn_store(shared, teachers):
    """The store of the `digits-cnn` among the teachers, float16, two views in three blocks."""

    def write(folder):
        run_job(make_job(folder / "s.zarr", teachers[1], block_rows=500))

    return shared("cnn", write) / "s.zarr"


@pytest.fixture(scope="session")
def thirds(shared, teachers):
    """float32 stores of the three teachers that know overlapping thirds of the classes, two views."""

    def write(folder):
        for teacher, known in zip(teachers, THIRDS, strict=True):
            taps = ("hidden1",) if teacher.name == "digits-mlp" else ()
            write_known(folder / f"{teacher.name}.zarr", teacher, known, taps=taps)

    folder = shared("thirds", write)
    return [folder / f"{teacher.name}.zarr" for teacher in teachers]


@pytest.fixture(scope="session")
def mapped_store(shared, teachers):
    """The float32 store of the `digits-resnet` among the teachers, with its last map, two views."""

    def write(folder):
        fields = {"encoding": "float32", "feature_encoding": "float32"}
        run_job(make_job(folder / "resnet.zarr", teachers[2], taps=(parse_tap("layer2"),), **fields))

    return shared("mapped", write) / "resnet.zarr"


@pytest.fixture(scope="session")
def tapped(shared, teachers):
    """float32 stores of the three teachers with features of a few layers, two views."""

    def write(folder):
        for teacher, texts in zip(teachers, TAPS, strict=True):
            taps = [parse_tap(text) for text in texts]
            encodings = {"encoding": "float32", "feature_encoding": "float32"}
            run_job(make_job(folder / f"{teacher.name}.zarr", teacher, taps=taps, **encodings))

    folder = shared("tapped", write)
    return [folder / f"{teacher.name}.zarr" for teacher in teachers]


@pytest.fixture
def stores_of(tapped, mapped_store):
    """The stores that a method is given: three, or one to methods that take the head of one teacher."""
    return lambda name: [mapped_store] if METHODS[name].objective.needs().teacher_head else tapped


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
def image_tree(tmp_path):
    """An ImageFolder tree `train` of 12 files of two sizes."""
    return write_images(tmp_path / "tree")


@pytest.fixture
def shards(image_tree, tmp_path):
    """A folder with the images of `image_tree` in the shards `s-0.tar` to `s-2.tar`."""
    return write_in_shards(tmp_path / "shards", members_of(image_tree / "train"))


@pytest.fixture
def store(written, tmp_path):
    """A copy, which a test may damage, of the store that its module wrote once as `written`."""
    shutil.copytree(written, tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


@contextmanager
def found(server):
    """Run a server, with the environment variables by which clients find it."""
    with server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def s3_server():
    """An S3 server on this machine."""
    from buckets import S3Server

    with found(S3Server()) as server:
        yield server


@pytest.fixture
def bucket(s3_server):
    """The name of an empty bucket. Afterwards the server fails no longer."""
    yield s3_server.new_bucket()
    s3_server.recover()


@pytest.fixture(scope="session")
def azure_server(tmp_path_factory):
    """An Azure server on this machine."""
    from azurite import AzureServer, found_azurite

    if found_azurite() is None:
        pytest.skip("there is no Azurite on this machine: npm install --global azurite")
    with found(AzureServer(tmp_path_factory.mktemp("azurite"))) as server:
        yield server


@pytest.fixture
def container(azure_server):
    """The name of an empty container. Afterwards the server fails no longer."""
    yield azure_server.new_container()
    azure_server.recover()


@pytest.fixture(scope="session")
def google_server():
    """A Google Cloud Storage server on this machine."""
    from google_storage import GoogleServer

    with found(GoogleServer()) as server:
        yield server


@pytest.fixture
def google_bucket(google_server):
    """The name of an empty bucket of that server. Afterwards it fails no longer."""
    yield google_server.new_bucket()
    google_server.recover()


HOMES = {"s3": "bucket", "gs": "google_bucket", "az": "container"}
"""The fixture with the name of a bucket of each service."""


@pytest.fixture(params=HOMES)
def home(request):
    """The address of an empty bucket of each service."""
    return f"{request.param}://{request.getfixturevalue(HOMES[request.param])}"


@pytest.fixture(scope="session")
def chromium():
    """The system's Chromium, headless."""
    if found_chromium() is None:
        pytest.skip("there is no Chromium on this machine: apt-get install chromium")
    with launched() as browser:
        yield browser


@pytest.fixture(scope="session")
def started(tmp_path_factory):
    """A Ray cluster of two nodes of this machine, which takes seconds to start."""
    from clusters import own_cluster

    with own_cluster(tmp_path_factory.mktemp("cluster")) as own:
        yield own


@pytest.fixture
def cluster(started):
    """The cluster, whose networks do nothing unusual."""
    started.calm()
    yield started
    gc.collect()  # sockets that Ray has left, while the filters of its tests hold
