"""The report in a real browser: no error, every filter, column and section clicked, light and dark."""

import runpy
from pathlib import Path

import pytest
from browsing import SCHEMES, click_everything, watched
from builders import CPU, make_recipe
from PIL import Image
from reported import metrics_line, taught, write_run

from coursepack.distill.report.build import build_report
from coursepack.distill.runs.train import train

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def report(tmp_path_factory, stores):
    """A report with all sections, an unfinished run, and names that a page must escape."""
    folder = tmp_path_factory.mktemp("report")
    for seed in (0, 1):
        train(make_recipe(limit=100, epochs=2, seed=seed), folder / f"alone-{seed}", device=CPU)
        recipe = make_recipe(stores[:2], limit=100, epochs=2, seed=seed)
        train(recipe, folder / f"kd-{seed}", device=CPU)
    lines = [metrics_line(epoch, 0.4) | taught(epoch) for epoch in range(3)]
    write_run(folder / "<script>throw 1<", lines, finished=False, stores=["<b>.zarr", "y.zarr"])
    html, _ = build_report(sorted(folder.iterdir()), CPU)
    file = folder / "report.html"
    file.write_text(html)
    return file


@pytest.fixture(params=SCHEMES, ids="-".join)
def page(request, chromium, report):
    """The report, opened at a size and in a color scheme."""
    with watched(chromium, report, *request.param) as page:
        yield page


def test_everything_can_be_clicked(page):
    click_everything(page)
    table = page.get_by_role("region", name="Cost", exact=True)
    table.get_by_role("button", name="seconds per run").click()
    seconds = [float(row.locator("td").nth(3).inner_text()) for row in table.locator("tbody tr").all()]
    assert seconds == sorted(seconds)


def test_filters_hide_rows_and_lines(page):
    boxes = page.locator("#filter input").all()
    assert len(boxes) == 3
    rows = page.locator("section#results tbody tr:visible")
    before = rows.count()
    lines = page.locator('svg [id$="-group-0"]')
    assert lines.first.is_visible()
    boxes[0].uncheck()
    assert not lines.first.is_visible()
    assert rows.count() == before - 1
    for box in boxes[1:]:
        box.uncheck()
    assert page.locator("[data-group]:visible").count() == 0
    for box in boxes:
        box.check()
    assert rows.count() == before


def test_the_keyboard_reaches_everything(page):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.get_by_role("button", name="accuracy", exact=True).first.focus()
    page.keyboard.press("Enter")
    assert page.locator('section#results th[aria-sort="ascending"]').inner_text().startswith("accuracy")
    page.locator("#filter input").first.focus()
    page.keyboard.press("Space")
    assert not page.locator("#filter input").first.is_checked()


def test_it_fits_the_window_and_has_the_colors_of_the_scheme(page):
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    ink = page.evaluate("getComputedStyle(document.querySelector('figure > svg text')).fill")
    assert (paper, ink) == (
        ("rgb(20, 23, 26)", "rgb(230, 232, 235)") if dark else ("rgb(255, 255, 255)", "rgb(27, 31, 36)")
    )
    assert page.locator("figure > svg").first.bounding_box()["height"] > 150
    assert len(page.screenshot()) > 10_000


def test_the_pictures_of_the_page_are_taken(chromium, report, tmp_path):
    script = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "pictures.py"))
    script["take"](chromium, report, tmp_path)
    for shot in script["SHOTS"]:
        with Image.open(tmp_path / f"{shot.name}.png") as image:
            paper = image.convert("RGB").getpixel((2, 2))
            assert max(paper) < 40 if shot.scheme == "dark" else min(paper) > 240
            assert image.width == {"desktop": 1200, "phone": 585}[shot.window]
