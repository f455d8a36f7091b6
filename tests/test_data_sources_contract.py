"""What holds for every source: one protocol, stable indices, hold-outs, pickles, worker processes."""

from __future__ import annotations

import pickle

import google_crc32c
import image_files
import numpy as np
import pytest
import spawned

from coursepack.data import SOURCES, open_source
from coursepack.data.sources import FirstSamples, InMemory, evaluation_spec
from coursepack.errors import RecipeError, UnknownName

WRITERS = {
    "cifar10": lambda root: image_files.write_cifar(root, 10),
    "cifar100": lambda root: image_files.write_cifar(root, 100),
    "cinic10": image_files.write_cinic10,
    "tiny-imagenet": image_files.write_tiny_imagenet,
    "imagenet": image_files.write_imagenet,
    "folder": lambda root: image_files.write_imagenet(root),
    "arrays": lambda root: [image_files.write_arrays(root / split) for split in ("train", "test")],
    "tar": image_files.write_shards,
}
SPECS = {
    "fake": "fake,classes=3,size=9,samples=30",
    "python": "python:image_files:Numbered",
}
NAMES = list(SOURCES)


def named(name, split="train", held=""):
    """The name of a split of a source; the split of shards is a pattern."""
    if name == "tar":
        return f"tar:{split}-{{0..1}}.tar{held}"
    return f"{SPECS.get(name, name)}:{split}{held}"


# A change of these literals makes stores of such sources unreadable.
# JPEG files are not in it, as libjpeg may write other bytes.
FINGERPRINTS = {
    "cifar10": "b6bea6ed8f7d7a9947f149658264ce5a912d18e4af9a810d1735f6e47d5ba67f",
    "cifar100": "ac93c8b585ae52f68d17290c32af92f9b1caf92a237e01760fe48979efda44de",
    "arrays": "7253ae6b32ec8e70383645cbc864c04e74edb9af183e56561c575ec529805f91",
    "fake": "2e07189577053b2922aae954228e091bc196c1b589a7aec5e0fbc6b9db801339",
    "python": "e87adeba3592139416b172ba56685d9330037d64b89c195952dbcb9f1c49dbf7",
    "tar": "9f1512908d50bf8284208a3390d6053f8ff1018c569e56ff1d3bfd1cf9851fa3",
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("roots")
    for name, write in WRITERS.items():
        write(folder / name)
    return {name: folder / name if name in WRITERS else None for name in NAMES}


@pytest.fixture(params=NAMES)
def opened(request, roots):
    """The name of a training split, and its root."""
    return named(request.param), roots[request.param]


def everything(source) -> np.ndarray:
    return np.arange(len(source.labels))


def test_every_name_is_tested():
    assert {*WRITERS, *SPECS, "digits"} == set(SOURCES)


def test_protocol(opened):
    spec, root = opened
    source = open_source(spec, root)
    assert source.name == spec
    if SOURCES[spec.partition(":")[0].partition(",")[0]].splits:
        assert open_source(spec.removesuffix(":train"), root).name == spec
    assert source.labels.dtype == np.int64
    assert source.labels.ndim == 1
    assert 0 <= source.labels.min() <= source.labels.max() < len(source.class_names)
    assert all(isinstance(name, str) for name in source.class_names)
    chosen = np.array([5, 0, 5, 2])
    pixels, sizes = source.pixels(chosen), source.sizes(chosen)
    assert isinstance(pixels, list if source.in_memory is None else np.ndarray)
    for image, size in zip(pixels, sizes, strict=True):
        assert image.dtype == np.uint8
        assert image.shape == (*size, source.channels)
    assert np.array_equal(pixels[0], pixels[2])
    assert not np.array_equal(pixels[0], pixels[1])
    if source.in_memory is not None:
        assert len(source.in_memory) == len(source.labels)
        assert np.array_equal(source.in_memory[chosen], pixels)
    assert (sizes.dtype, sizes.shape) == (np.int32, (4, 2))
    contents = source.contents(chosen)
    assert (contents.dtype, contents.shape) == (np.uint32, (4,))
    assert contents[0] == contents[2] != contents[1]
    if not hasattr(source, "path"):
        assert contents.tolist() == [google_crc32c.value(image.tobytes()) for image in pixels]
    assert len(source.pixels(chosen[:0])) == len(source.sizes(chosen[:0])) == 0
    source.check()
    assert int(source.fingerprint, 16) < 1 << 256


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_fingerprints_never_change(name, roots):
    assert open_source(named(name), roots[name]).fingerprint == FINGERPRINTS[name]


def test_the_test_images_of_fake_never_change():
    test = open_source(f"{SPECS['fake']}:test")
    assert test.fingerprint == "1ec4c644e1f4a3ea9d90ef987fd924bf1706feca4be97d47298d77a6039550d0"


def test_a_name_opens_the_same_source_again(opened):
    spec, root = opened
    prints = set()
    for part in ("", "-0.25", "+0.250", "+0.5"):
        source = open_source(spec + part, root)
        again = open_source(source.name, root)
        assert again.name == source.name
        assert again.fingerprint == source.fingerprint
        prints.add(source.fingerprint)
    name = spec.partition(":")[0]
    evaluation = open_source(named(name, "val") if name == "tar" else evaluation_spec(spec), root)
    assert len(prints | {evaluation.fingerprint}) == 5


def test_pickles_are_small_and_give_the_same(opened):
    spec, root = opened
    in_memory = isinstance(open_source(spec, root), InMemory)
    for source in (open_source(spec, root), open_source(f"{spec}-0.5", root)):
        fresh = pickle.dumps(source)
        _ = source.in_memory, source.fingerprint, source.pixels(everything(source))
        used = pickle.dumps(source)
        if in_memory:
            assert len(used) < len(fresh) + 500
        else:
            assert len(used) <= len(fresh)
            assert len(used) < 4000
        again = pickle.loads(used)
        assert_same(again, source)


def test_first_samples(opened):
    spec, root = opened
    source = open_source(spec, root)
    first = FirstSamples(source, 6)
    assert first.name == f"{spec}[:6]"
    assert first.fingerprint not in (source.fingerprint, FirstSamples(source, 5).fingerprint)
    assert (first.in_memory is None) == (source.in_memory is None)
    assert_same_rows(first, source, np.arange(6))
    first.check()


def assert_same(left, right):
    assert (left.name, left.fingerprint, left.class_names) == (
        right.name,
        right.fingerprint,
        right.class_names,
    )
    assert_same_rows(left, right, everything(right))


def assert_same_rows(part, source, chosen):
    """Sample i of `part` is sample `chosen[i]` of `source`."""
    samples = everything(part)
    assert np.array_equal(part.labels, source.labels[chosen])
    assert np.array_equal(part.sizes(samples), source.sizes(chosen))
    assert np.array_equal(part.contents(samples), source.contents(chosen))
    for left, right in zip(part.pixels(samples), source.pixels(chosen), strict=True):
        assert np.array_equal(left, right)


def test_hold_outs_divide_a_split(opened):
    spec, root = opened
    source = open_source(spec, root)
    kept, held = (open_source(f"{spec}{sign}0.4", root) for sign in "-+")
    assert (kept.name, held.name) == (f"{spec}-0.4", f"{spec}+0.4")
    assert not set(kept.picked) & set(held.picked)
    assert sorted([*kept.picked, *held.picked]) == list(range(len(source.labels)))
    for part in (kept, held):
        assert np.all(np.diff(part.picked) > 0)
        assert_same_rows(part, source, part.picked)
        assert part.class_names == source.class_names
        assert (part.in_memory is None) == (source.in_memory is None)
        assert isinstance(part.pixels(everything(part)), list if part.in_memory is None else np.ndarray)
        part.check()
    assert len(held.labels) == int(0.4 * len(source.labels) + 0.5)
    classes = len(source.class_names)
    share = np.bincount(source.labels, minlength=classes) * 0.4
    assert np.all(np.abs(np.bincount(held.labels, minlength=classes) - share) <= 1)


def test_a_hold_out_never_changes():
    held = open_source("digits:train+0.01")
    assert held.picked.tolist() == [27, 38, 166, 205, 264, 274, 447, 589, 667, 737, 899, 1073, 1389, 1396]
    assert held.fingerprint == "23fcb892f1fceac0958bfb0bee0b9d3a2037ea63a6050fbacbbab74e60524a14"


def test_a_hold_out_is_not_the_first_samples_and_grows_with_the_share():
    tenth, fifth = (set(open_source(f"digits:train+{share}").picked.tolist()) for share in (0.1, 0.2))
    assert tenth != set(range(len(tenth)))
    assert len(tenth - fifth) <= 10


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("cifar100:train-0.10", "cifar100:train+0.1"),
        ("cifar100:-.1", "cifar100:train+0.1"),
        ("cifar100:train+0.1", "cifar100:test"),
        ("cifar100", "cifar100:test"),
        ("fake,classes=3,seed=0:train", "fake,classes=3,seed=0:test"),
        ("fake,classes=3:test-0.5", "fake,classes=3:test+0.5"),
        ("python:a.b:c", "python:a.b:c:test"),
        ("python:a.b:c:train-0.2", "python:a.b:c:train+0.2"),
        ("folder:my-own-split", "folder:val"),
    ],
)
def test_evaluation_spec(spec, expected):
    assert evaluation_spec(spec) == expected


@pytest.mark.parametrize(
    ("spec", "error", "text"),
    [
        ("digits:train-1.0", RecipeError,
         r"split 'train-1.0' holds out a share of 1.0, expected one between 0 and 1, as in 'train-0.1' "
         r"\(all but a tenth\) or 'train\+0.1' \(that tenth\)"),
        ("digits:train+0.0", RecipeError, "holds out a share of 0.0"),
        ("digits:train-0.0001", RecipeError,
         "a share of 0.0001 of source 'digits:train' is 0 of its 1442 samples: choose one that leaves "
         "samples on both sides"),
        ("digits:trian-0.1", UnknownName, "unknown split of source 'digits' 'trian'. Did you mean 'train'?"),
        ("digits:train-1", UnknownName, "unknown split of source 'digits' 'train-1'"),
        ("digits,size=3", RecipeError,
         "source 'digits,size=3': 'digits' has no options, but 'size=3' is given"),
        ("cifar", UnknownName, r"unknown source 'cifar'\. Did you mean 'cifar10'\?"),
        ("python:module", RecipeError, "source 'python:module' is not python:module:factory"),
    ],
)  # fmt: skip
def test_refused_specs(spec, error, text):
    with pytest.raises(error, match=text):
        open_source(spec)


@pytest.mark.parametrize("name", WRITERS)
def test_sources_of_files_need_a_root_that_is_there(name, tmp_path):
    spec = named(name)
    with pytest.raises(RecipeError) as refused:
        open_source(spec)
    assert str(refused.value).startswith(f"source '{spec}' reads files: give --root, a folder that holds")
    absent = tmp_path / "absent"
    with pytest.raises(OSError, match="there is no such folder") as caught:
        open_source(spec, absent)
    assert f"source '{spec}' cannot be read from --root '{absent}'" in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="the folder is empty") as caught:
        open_source(spec, tmp_path / "empty")
    if name not in ("folder", "arrays", "tar"):
        assert "from its home page" in str(caught.value)


def test_sources_go_to_worker_processes(roots):
    sources = [open_source(named(name, held="-0.5"), roots[name]) for name in NAMES]
    queue = spawned.FORKED.SimpleQueue()
    process = spawned.FORKED.Process(target=spawned.tell_all, args=(sources, queue))
    process.start()
    for source in sources:
        assert queue.get() == spawned.told(source)
    process.join()
    assert process.exitcode == 0
