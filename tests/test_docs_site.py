"""The docs site: a build without warnings, links and anchors in its HTML, and all public names."""

import importlib
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytestmark = pytest.mark.integration
DOCS = Path(__file__).parents[1] / "docs"
PACKAGES = ("data", "distill", "kernels", "models", "precompute")


def build(docs, site):
    """Build a site as `make docs` does."""
    words = ["--fail-on-warning", "--keep-going", "--quiet", "-d", site / ".doctrees", docs, site]
    return subprocess.run([sys.executable, "-m", "sphinx", *words], capture_output=True, text=True)


class Links(HTMLParser):
    """Identifiers, links and loaded addresses of a page."""

    def __init__(self, file):
        super().__init__()
        self.identifiers, self.links, self.loads = set(), set(), set()
        self.feed(file.read_text())

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.identifiers.add(values.get("id"))
        if tag == "a":
            self.links.add(values.get("href", ""))
        elif address := values.get("src") or (tag == "link" and values.get("href")):
            self.loads.add(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    result = build(DOCS, folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    """Links of every page, by path."""
    return {file: Links(file) for file in site.rglob("*.html") if "_static" not in file.parts}


def test_every_page_is_there(site, pages):
    sources = {page.relative_to(DOCS).with_suffix(".html") for page in DOCS.rglob("*.md")}
    assert sources <= {page.relative_to(site) for page in pages}
    assert "picture.svg" in (site / "index.html").read_text()


def test_every_link_leads_somewhere(pages):
    checked = 0
    for page, found in pages.items():
        for link in found.links | found.loads:
            address = urlsplit(link)
            if address.scheme in ("http", "https"):
                continue
            target = (page.parent / unquote(address.path)).resolve() if address.path else page
            assert target.is_file(), f"{page.name}: {link}"
            if address.fragment and target in pages:
                assert unquote(address.fragment) in pages[target].identifiers, f"{page.name}: {link}"
            checked += 1
    assert checked > 500


def test_pages_load_nothing_from_the_network(pages):
    for page, found in pages.items():
        assert not {load for load in found.loads if urlsplit(load).scheme or load.startswith("//")}, page


def test_all_public_names_are_described(site, pages):
    api = pages[site / "api.html"]
    text = (DOCS / "api.md").read_text()
    for package in PACKAGES:
        module = importlib.import_module(f"coursepack.{package}")
        for name in module.__all__:
            described = (
                f"`{name}`" in text if name.isupper() else f"{module.__name__}.{name}" in api.identifiers
            )
            assert described, f"{module.__name__}.{name} is not in docs/api.md"


WRONG = {
    "gone.md": "[page](gone.md)",
    "nowhere": "[anchor](#nowhere)",
    "lost.png": "![picture](lost.png)",
    "absent": "```{eval-rst}\n.. autofunction:: coursepack.absent\n```",
}
"""Text of a page, by the name that does not exist."""


def test_what_does_not_exist_fails_the_build(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "conf.py").write_text((DOCS / "conf.py").read_text())
    (tmp_path / "docs" / "index.md").write_text("\n\n".join(["# Page", *WRONG.values(), ""]))
    result = build(tmp_path / "docs", tmp_path / "site")
    assert result.returncode != 0
    warnings = [line for line in result.stderr.splitlines() if "WARNING: " in line]
    for name in WRONG:
        assert any(name in line for line in warnings), result.stderr
