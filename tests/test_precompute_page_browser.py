"""The page about stores in a real browser: no error, everything clicked, light and dark, on a phone too."""

import pytest
from browsing import SCHEMES, click_everything, watched
from builders import write_store, write_teacher
from image_files import write_arrays

from coursepack.data import open_source
from coursepack.precompute.page.build import build_page

pytestmark = pytest.mark.browser
NAMES = ("<script>throw 1</script>", "<img src=x onerror=throw>", "a" * 80)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A page with all sections, of stores and classes whose names a page must escape."""
    folder = tmp_path_factory.mktemp("page")
    write_arrays(folder / "train", 60, size=(24, 24), names=NAMES)
    source = open_source("arrays", folder)
    stores = []
    for seed, name in enumerate(("<b>throw", "mlp")):
        teacher = write_teacher(folder / f"teacher-{seed}", "digits-mlp", classes=3, seed=seed)
        job = {"source": source, "root": folder, "views": 3, "encoding": "float16", "block_rows": 30}
        order = iter([0, 1, 2, 3, 4]) if seed else None
        stores.append(write_store(folder / f"{name}.zarr", teacher, order=order, **job))
    html, problems = build_page(stores, None, views=3)
    assert problems == []
    (folder / "page.html").write_text(html)
    return folder / "page.html"


@pytest.fixture(params=SCHEMES, ids="-".join)
def page(request, chromium, file):
    """The page, opened at a size and in a color scheme."""
    with watched(chromium, file, *request.param) as page:
        yield page


def test_everything_can_be_clicked(page):
    click_everything(page)
    table = page.get_by_role("region", name="Disagreement by class", exact=True)
    table.get_by_role("button", name="samples").click()
    assert table.locator("tbody tr").count() == 3


def test_pictures_are_drawn_and_described(page):
    images = page.locator(".gallery img")
    assert images.count() > 6 * 3
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert all(image.get_attribute("alt") for image in images.all())


def test_a_store_can_be_hidden(page):
    boxes = page.locator("#filter input").all()
    assert len(boxes) == 2
    answers = page.locator(".gallery dl:visible")
    before = answers.count()
    boxes[0].uncheck()
    assert answers.count() == before // 2
    boxes[0].check()
    assert answers.count() == before


def test_it_fits_the_window(page):
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert len(page.screenshot()) > 10_000
