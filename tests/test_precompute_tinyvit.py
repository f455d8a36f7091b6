"""`precompute import --format tinyvit`: records as TinyViT writes them, read as its trainer reads them."""

from __future__ import annotations

import math
import shutil
import struct

import numpy as np
import pytest
from cached import call, right_probs, smoothed, softmax_of, top, write_digits
from click.testing import CliRunner
from image_files import save_image
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F
from view_cases import smooth

from coursepack.data import ViewRecipe, open_source
from coursepack.data.store import StoreReader
from coursepack.data.views import draw, render
from coursepack.distill.cli import main as distill

K = 4
EPOCHS = (3, 7)


def write_records(folder, keys, probs, seeds, *, ranks=2, k=K):
    """The files of an epoch; the first image is in all ranks, as samplers that pad leave it."""
    folder.mkdir(parents=True)
    ids, values = top(probs, k)
    for rank in range(ranks):
        rows = [*range(rank, len(keys), ranks)]
        rows = rows if 0 in rows else [*rows, 0]
        with (folder / f"rank{rank}-values.bin").open("wb") as file:
            for row in rows:
                file.write(struct.pack("<i", seeds[row]))
                file.write(struct.pack(f"<{k}h", *ids[row].tolist()))
                file.write(struct.pack(f"<{k}e", *values[row].tolist()))
        (folder / f"rank{rank}-keys.txt").write_text("".join(f"{keys[row]}\n" for row in rows))


def write_cache(folder, source, *, by_name=False):
    """Two epochs of records; returns probabilities and seeds of each."""
    count = len(source.labels)
    names = [source.path(sample).rpartition("/")[2].removesuffix(".png") for sample in range(count)]
    keys = names if by_name else list(range(count))
    written = []
    for epoch in EPOCHS:
        probs = right_probs(source.labels, seed=epoch)
        seeds = np.random.default_rng(epoch).integers(0, 1 << 31, count).astype(np.int32)
        write_records(folder / f"logits_top{K}_epoch{epoch}", keys, probs, seeds)
        written.append((probs, seeds))
    return written


@pytest.fixture(scope="module")
def digits(tmp_path_factory, cache):
    """An image folder of digits."""
    return write_digits(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def records(tmp_path_factory, digits):
    """TinyViT's records of it."""
    folder = tmp_path_factory.mktemp("tinyvit") / "records"
    write_cache(folder, open_source("folder", digits))
    return folder


def words(folder, root, store):
    return ("import", folder, "--format", "tinyvit", "--source", "folder", "--root", root, "--out", store)


@pytest.mark.parametrize("by_name", [False, True])
def test_records_are_read_as_by_tinyvits_reader(digits, tmp_path, by_name):
    written = write_cache(tmp_path / "records", open_source("folder", digits), by_name=by_name)
    store = tmp_path / "s.zarr"
    shown = call(*words(tmp_path / "records", digits, store), "--view", "none", "--encoding", "float32")
    assert "without views of its own" in " ".join(shown.split())
    reader = StoreReader(store)
    assert reader.manifest.identity["teacher"]["imported"]["epochs"] == list(EPOCHS)
    for view, (probs, _) in enumerate(written):
        ids, values = top(probs, K)
        expected = smoothed(ids, values.astype(np.float16).astype(np.float64))
        assert np.allclose(softmax_of(reader, view), np.maximum(expected, 0), atol=1e-3)


def test_the_view_is_the_users_word(digits, records, tmp_path):
    line = call(*words(records, digits, tmp_path / "s.zarr"), status=1)
    for part in ("does not say which view", "--replay-seeds", "cannot be replayed here"):
        assert part in line
    line = call(*words(records, digits, tmp_path / "s.zarr"), "--view", "cifar", status=1)
    assert "is drawn at random" in line
    line = call(*words(records, digits, tmp_path / "s.zarr"), "--view", "none", "--replay-seeds", status=1)
    assert "give one" in line


def drawn(seed, height, width):
    """Crop and flip of one image, from the description of TinyViT's augmentations."""
    words = iter(np.random.Generator(np.random.PCG64(seed)).random(30).tolist())
    for _ in range(10):
        area = height * width * (0.08 + next(words) * (1 - 0.08))
        low, high = math.log(3 / 4), math.log(4 / 3)
        ratio = math.exp(low + next(words) * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w <= width and h <= height:
            i = min(int(next(words) * (height - h + 1)), height - h)
            j = min(int(next(words) * (width - w + 1)), width - w)
            return i, j, h, w, next(words) < 0.5
    if width / height < 3 / 4:
        h, w = round(width / (3 / 4)), width
    elif width / height > 4 / 3:
        h, w = height, round(height * (4 / 3))
    else:
        h, w = height, width
    return (height - h) // 2, (width - w) // 2, h, w, next(words) < 0.5


def test_seeds_are_replayed_as_crops_and_flips(tmp_path):
    sizes = ((40, 60), (37, 23), (64, 64), (9, 200), (200, 9))
    for number in range(40):
        image = smooth(*sizes[number % 5], seed=number)
        save_image(tmp_path / "train" / f"c{number % 10}" / f"{number:02d}.png", image)
    source = open_source("folder", tmp_path)
    written = write_cache(tmp_path / "records", source)
    store = tmp_path / "s.zarr"
    shown = call(*words(tmp_path / "records", tmp_path, store), "--replay-seeds")
    assert "with recorded views" in " ".join(shown.split())
    identity = StoreReader(store).manifest.identity
    recipe = ViewRecipe.model_validate(identity["view"]["recipe"]).located(str(store))
    samples = np.arange(len(source.labels))
    for view, (_, seeds) in enumerate(written):
        pixels = render(recipe, source, samples, draw(recipe, source, samples, view), 24)
        for sample, seed in enumerate(seeds.tolist()):
            image = Image.open(source.path(sample)).convert("RGB")
            i, j, h, w, flipped = drawn(seed, image.size[1], image.size[0])
            theirs = F.resized_crop(image, i, j, h, w, [24, 24], InterpolationMode.BILINEAR)
            theirs = F.hflip(theirs) if flipped else theirs
            assert np.abs(pixels[sample].astype(int) - np.asarray(theirs).astype(int)).max() <= 1


@pytest.mark.parametrize("given", [("--view", "none"), ("--replay-seeds",)])
def test_students_learn_from_it(digits, records, tmp_path, given):
    call(*words(records, digits, tmp_path / "s.zarr"), *given)
    line = ["train", "--student", "digits-small", "--store", tmp_path / "s.zarr", "--epochs", 2]
    line += ["--workers", 0, "--out", tmp_path / "run"]
    result = CliRunner().invoke(distill, list(map(str, line)))
    assert result.exit_code == 0, result.output


# Wrong files


def shortened(folder):
    path = folder / "rank1-values.bin"
    path.write_bytes(path.read_bytes()[:-3])


def without_a_key(folder):
    path = folder / "rank1-keys.txt"
    path.write_text(path.read_text().partition("\n")[2])


def with_key(key):
    def change(folder):
        path = folder / "rank0-keys.txt"
        path.write_text(path.read_text().replace("2\n", f"{key}\n", 1))

    return change


def with_bytes(offset, data):
    def change(folder):
        path = folder / "rank0-values.bin"
        content = bytearray(path.read_bytes())
        content[offset : offset + len(data)] = data
        path.write_bytes(content)

    return change


def without_rank(folder):
    for name in ("rank1-keys.txt", "rank1-values.bin"):
        (folder / name).unlink()


CHANGES = [
    (shortened, "It is truncated"),
    (without_a_key, "It is truncated"),
    (with_key("999"), "no samples of source 'folder:train', such as '999'"),
    (with_key("name"), "no samples of source 'folder:train'"),
    (with_bytes(4, struct.pack("<h", 10)), "expected ids 0 to 9"),
    (with_bytes(4, struct.pack("<h", -1)), "expected ids 0 to 9"),
    (with_bytes(4 + 2 * K, struct.pack("<e", math.nan)), "expected probabilities"),
    (with_bytes(4 + 2 * K, struct.pack("<e", -0.5)), "expected probabilities"),
    (with_bytes(0, struct.pack("<i", -5)), "has the seed -5"),
    (without_rank, "has no record for 20 of 40 samples"),
    (lambda folder: (folder / "rank1-keys.txt").unlink(), "is missing"),
    (lambda folder: (folder / "rank1-keys.txt").write_bytes(b"\xff\n"), "it is no text"),
    (lambda folder: [path.unlink() for path in folder.iterdir()], "has no rankR-values.bin"),
    (lambda folder: folder.rename(folder.with_name("logits_top5_epoch7")), "expected one number"),
]


@pytest.mark.parametrize(("change", "expected"), CHANGES)
def test_wrong_records_are_refused(digits, records, tmp_path, change, expected):
    shutil.copytree(records, tmp_path / "records")
    change(tmp_path / "records" / f"logits_top{K}_epoch7")
    line = call(*words(tmp_path / "records", digits, tmp_path / "s.zarr"), "--replay-seeds", status=1)
    assert expected in line
    assert not (tmp_path / "s.zarr").exists()


def test_other_refusals(digits, records, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, expected in (("none", "there is no folder"), ("empty", "has no folder logits_topK_epochE")):
        line = call(*words(tmp_path / folder, digits, tmp_path / "s.zarr"), "--view", "none", status=1)
        assert expected in line


def test_one_epoch_can_be_imported(digits, records, tmp_path):
    folder = records / f"logits_top{K}_epoch7"
    call(*words(folder, digits, tmp_path / "s.zarr"), "--view", "none")
    assert StoreReader(tmp_path / "s.zarr").views == (0,)
