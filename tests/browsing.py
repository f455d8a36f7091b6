"""Pages of reports in a real browser."""

import shutil
from contextlib import contextmanager

NAMES = ("chromium", "chromium-browser", "google-chrome")
SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 360, "height": 740}}
SCHEMES = [("desktop", "light"), ("phone", "dark")]
"""Each size and each color scheme: a scheme only sets colors, whatever the size."""


def found_chromium():
    """Path of the system's Chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def launched():
    """The system's Chromium, headless."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found_chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def watched(chromium, file, size, scheme):
    """A file opened at a size and in a color scheme; fails if it complains or loads more."""
    page = chromium.new_page(viewport=SIZES[size], color_scheme=scheme)
    page.set_default_timeout(60_000)
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda each: requests.append(each.url))
    page.goto(file.as_uri())
    yield page
    page.close()
    assert complaints == []
    assert {url for url in requests if not url.startswith("data:image/png;")} == {file.as_uri()}


def click_everything(page):
    """Follow every link to a section, open everything folded, and sort every table by every column."""
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
