"""`precompute inspect --html`: samples, answers, disagreement, fidelity, gaps and damage on one page."""

from __future__ import annotations

import base64
import io
import re
import shutil

import numpy as np
import pytest
from builders import write_store, write_teacher
from click.testing import CliRunner
from image_files import write_arrays
from PIL import Image
from reported import Page
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax

from coursepack.data import Batch, open_source, view_recipe
from coursepack.data.store import StoreReader
from coursepack.data.store.records import fidelity_summary
from coursepack.precompute.cli import main
from coursepack.precompute.inspect import agreement
from coursepack.precompute.page.build import build_page
from coursepack.precompute.picture import random_samples

ALL = ["stores", "samples", "disagreement", "agreement", "views", "fidelity", "gaps", "checksums", "identity"]
HOSTILE = ("<script>throw 1</script>", "<img src=x onerror=alert(1)>", "a & b")


@pytest.fixture(scope="module")
def html(stores):
    html, problems = build_page(stores, None, views=2)
    assert problems == []
    return html


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A folder with a source whose classes have names of HTML, and two stores of it."""
    folder = tmp_path_factory.mktemp("hostile")
    write_arrays(folder / "train", size=(12, 12), names=HOSTILE)
    source = open_source("arrays", folder)
    for seed, name in enumerate(("<b>", "cnn")):
        teacher = write_teacher(folder / f"teacher-{seed}", "digits-mlp", classes=3, seed=seed)
        write_store(folder / f"{name}.zarr", teacher, source=source, root=folder)
    return folder


def page_of(*stores, root=None, **options):
    html, problems = build_page(stores, root, views=1, **options)
    return Page(html), problems


def inspect(*words):
    return CliRunner().invoke(main, ["inspect", *map(str, words)])


def galleries(html):
    """Title and pictures of each gallery: title, PNG or None, answers as `(store, classes, is right)`."""
    for title, body in re.findall(r"<h3>(.*?)</h3>\s*<ul class=\"gallery\">(.*?)</ul>", html, re.S):
        items = re.findall(r"<li>(.*?)</li>", body, re.S)
        pictures = []
        for item in items:
            found = re.search(r'src="data:image/png;base64,(.*?)"', item)
            content = None if found is None else base64.b64decode(found[1])
            answers = [
                (name, re.findall(r"<dd>(.*?)</dd>", lines), kind == "right")
                for kind, name, lines in re.findall(
                    r'<dl class="(\w+)"[^>]*>\s*<dt>(.*?)</dt>(.*?)</dl>', item, re.S
                )
            ]
            pictures.append((re.search(r"<p>(.*?)</p>", item)[1], content, answers))
        yield title, pictures


def all_probs(store, view=0):
    reader = StoreReader(store)
    rows = reader.rows("logits", view, np.arange(reader.manifest.samples)).decode().double().numpy()
    return softmax(rows, axis=1)


def test_every_section_is_there(page):
    assert page.sections == ALL
    assert "3 stores of 1,442 samples of digits:train, 10 classes." in page.texts
    assert [row[0] for row in page.tables["Stores"][1:]] == ["digits-mlp", "digits-cnn", "digits-resnet"]


def test_samples_are_shown_as_the_teachers_saw_them_with_their_answers(html, stores):
    source = open_source("digits")
    shown = list(galleries(html))
    samples = random_samples(1442)
    for sample, (title, pictures) in zip(samples, shown, strict=False):
        assert title == f"Sample {sample}: {source.labels[sample]}"
        assert [name for name, _, _ in pictures] == ["original", "view 0", "view 1"]
        for view, (_, content, answers) in enumerate(pictures[1:]):
            batch = Batch(source, view_recipe("digits"), np.array([sample]), np.array([view]))
            with Image.open(io.BytesIO(content)) as image:
                assert (np.asarray(image) == batch.pixels(8).numpy()[0, ..., 0]).all()
            for store, (name, classes, is_right) in zip(stores, answers, strict=True):
                probs = all_probs(store, view)[sample]
                top = np.argsort(-probs)[:3]
                assert name == store.stem
                assert classes == [f"{label} {probs[label]:.0%}" for label in top]
                assert is_right == (top[0] == source.labels[sample])


def test_disagreement_is_the_divergence_of_jensen_and_shannon(page, stores):
    source, (first, second) = open_source("digits"), stores[:2]
    pair, problems = build_page([first, second], None, views=1, verify=False)
    assert problems == []
    expected = jensenshannon(all_probs(first), all_probs(second), axis=1) ** 2
    titles = [title for title, _ in galleries(pair)][-8:]
    worst = np.argsort(-expected)[:8]
    assert titles == [f"Sample {i}: {source.labels[i]}, divergence {expected[i]:.3f}" for i in worst]
    for label, count, divergence, _ in Page(pair).tables["Disagreement by class"][1:]:
        rows = source.labels == int(label)
        assert int(count) == rows.sum()
        assert float(divergence) == pytest.approx(expected[rows].mean(), abs=6e-4)
    top = np.stack([all_probs(store).argmax(1) for store in stores])
    same = (top == top[0]).all(0)
    assert any(f"same top class for {same.mean():.2%} of the samples" in text for text in page.texts)
    (last,) = page.tables["Disagreement by class"][-1:]
    assert last[3] == f"{same[source.labels == int(last[0])].mean():.2%}"


def test_agreement_is_that_of_inspect(page, stores):
    shares = agreement([StoreReader(store) for store in stores], 0)
    table = page.tables["Share of samples with the same top class in view 0"]
    assert [row[1:] for row in table[1:]] == [[f"{share:.2%}" for share in row] for row in shares]


def test_fidelity_is_what_the_store_records(page, cnn_store):
    assert {cell for row in page.tables["Error of the stored logits"][1:] for cell in row[2:]} == {"exact"}
    lossy, problems = page_of(cnn_store)
    assert problems == []
    assert "disagreement" not in lossy.sections
    records = StoreReader(cnn_store).manifest.view_records
    for view, row in enumerate(lossy.tables["Error by view"][1:]):
        summary = fidelity_summary(records[str(view)]["fidelity"])
        values = [entry[what] for entry in summary.values() for what in ("mean", "p99", "largest")]
        assert row[2:] == [f"{value:.2g}" for value in values]
    (whole,) = lossy.tables["Error of the stored logits"][1:]
    assert whole[1] == "float16"
    assert float(whole[2]) > 0


def test_missing_views_and_blocks_are_shown(teachers, stores, tmp_path):
    job = {"views": 4, "block_rows": 500, "order": iter([0, 1, 2, 6, 7])}
    store = write_store(tmp_path / "part.zarr", teachers[0], **job)
    page, problems = page_of(store)
    assert problems == []
    assert page.tables["Arrays and their views"][1][5:] == ["1 of 4", "1-3"]
    assert page.tables["Views that are not committed yet"][1:] == [["part", "2", "2 of 3"]]
    both, problems = page_of(store, stores[1])
    assert problems == []
    assert both.tables["Arrays and their views"][2][5:] == ["3 of 3", "none"]


def test_a_store_without_a_view_is_shown_as_far_as_it_goes(teachers, tmp_path):
    store = write_store(tmp_path / "none.zarr", teachers[0], block_rows=500, order=iter([0]))
    page, problems = page_of(store)
    assert len(problems) == 1
    assert "has committed none of its 2 views" in problems[0]
    assert problems[0] in page.texts
    assert page.sections == ["problems", "stores", "gaps", "checksums", "identity"]
    assert page.tables["Views that are not committed yet"][1:] == [["none", "0", "1 of 3"]]


def test_damage_is_shown_and_survived(stores, tmp_path):
    store = tmp_path / "mlp.zarr"
    shutil.copytree(stores[0], store)
    shard = next(store.glob("logits/*/c.0.*"))
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    result = inspect(store, stores[1], "--html", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{tmp_path / 'page.html'}: ")
    assert f"{shard.name}: content does not match its checksum" in result.stderr
    page = Page((tmp_path / "page.html").read_text())
    assert page.sections[:2] == ["problems", "stores"]
    assert page.sections[-4:] == ["fidelity", "gaps", "checksums", "identity"]
    assert [row[3] for row in page.tables["Checksums"][1:]] == ["1", "0"]
    unchecked, _ = page_of(store, verify=False)
    assert "checksums" not in unchecked.sections


def test_names_are_escaped_and_nothing_is_loaded(hostile):
    html, problems = build_page([hostile / "<b>.zarr", hostile / "cnn.zarr"], None, views=2)
    assert problems == []
    page = Page(html)
    assert {row[0] for row in page.tables["Disagreement by class"][1:]} == set(HOSTILE)
    assert page.tables["Stores"][1][0] == "<b>"
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not any(tag == "b" or "onerror" in attributes for tag, attributes in page.tags)
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert len(page.identifiers) == len(set(page.identifiers))
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")


def test_without_the_source_the_answers_are_shown(hostile, tmp_path):
    page, problems = page_of(hostile / "cnn.zarr", root=tmp_path)
    assert len(problems) == 1
    assert problems[0].startswith("pictures left out: ")
    assert not [tag for tag, _ in page.tags if tag == "img"]
    whole, _ = page_of(hostile / "cnn.zarr")
    answers = [text for text in page.texts if re.search(r" \d+%$", text)]
    assert answers == [text for text in whole.texts if re.search(r" \d+%$", text)] != []


def test_what_cannot_be_shown_is_refused(stores, hostile, tmp_path):
    out = tmp_path / "page.html"
    mixed = inspect(stores[0], hostile / "cnn.zarr", "--html", out)
    assert (mixed.exit_code, "Traceback" in mixed.output) == (1, False)
    assert "the stores were written from different pixels" in mixed.stderr
    nowhere = inspect(stores[0], "--html", tmp_path / "no" / "page.html")
    assert nowhere.exit_code == 1
    assert f"there is no folder '{tmp_path / 'no'}'. Choose another --html" in nowhere.stderr
    folder = inspect(stores[0], "--html", tmp_path)
    assert "it is a folder. Choose another --html" in folder.stderr
    both = inspect(stores[0], "--html", out, "--out", tmp_path / "grid.png")
    assert (both.exit_code, "give one of them" in both.stderr) == (2, True)
    assert not out.exists()
