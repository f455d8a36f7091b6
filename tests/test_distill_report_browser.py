"""The report in a real browser: no error, every filter, column and section clicked, light and dark."""

import shutil

import pytest
from builders import CPU, make_recipe
from reported import metrics_line, taught, write_run

from coursepack.distill.report.build import build_report
from coursepack.distill.runs.train import train

pytestmark = pytest.mark.browser
SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 360, "height": 740}}


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


@pytest.fixture(scope="module")
def chromium():
    """The system's Chromium, headless."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("there is no Chromium on this machine: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[(size, scheme) for size in SIZES for scheme in ("light", "dark")], ids="-".join)
def page(request, chromium, report):
    """The report, opened at a size and in a color scheme; fails if the browser complains."""
    size, scheme = request.param
    page = chromium.new_page(viewport=SIZES[size], color_scheme=scheme)
    page.set_default_timeout(10_000)
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda each: requests.append(each.url))
    page.goto(report.as_uri())
    yield page
    page.close()
    assert complaints == []
    assert requests == [report.as_uri()], "it loads nothing else"


def test_everything_can_be_clicked(page):
    for link in page.locator("nav a").all():
        link.click()
        assert page.locator(link.get_attribute("href")).is_visible()
    for summary in page.locator("summary").all():
        summary.click()
    for table in page.locator("table").all():
        for button in table.locator("thead button").all():
            for order in ("ascending", "descending"):
                button.click()
                assert button.locator("..").get_attribute("aria-sort") == order
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
