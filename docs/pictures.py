"""Takes the pictures of docs/report.md: the report of the demo's runs, in headless Chromium.

    make pictures

The report is written by `distill report` and opened as a file. Each picture starts at a section of the page
and has the size of a window, with few colors, so that it stays small.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from coursepack.distill.cli import main as distill

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from browsing import launched

DOCS = Path(__file__).parent
RUNS = ("alone-lr0.1", "distilled-lr0.1")
"""Beginnings of the names of the demo's runs that the report shows."""
COLORS = 256
WINDOWS = {
    "desktop": {"viewport": {"width": 1200, "height": 1190}},
    "phone": {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 1.5},
}


@dataclass(frozen=True)
class Shot:
    """Picture of a part of the report."""

    name: str
    window: str
    """Key of `WINDOWS`."""
    scheme: str
    """Color scheme, `light` or `dark`."""
    section: str | None = None
    """Anchor of the section at the top of the picture; None for the top of the page."""
    opened: str | None = None
    """Anchor of a section whose first folded table is opened."""


SHOTS = (
    Shot("report-desktop-light", "desktop", "light"),
    Shot("report-desktop-dark", "desktop", "dark", "classes", opened="confusion"),
    Shot("report-phone-light", "phone", "light"),
    Shot("report-phone-dark", "phone", "dark", "accuracy"),
)


def main() -> None:
    """Write the report of the demo's runs, and its pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="folder of the demo")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the pictures")
    chosen = parser.parse_args()
    runs = [run for name in RUNS for run in sorted((chosen.demo / "runs").glob(f"{name}-*"))]
    if not runs:
        parser.error(f"{str(chosen.demo)!r} has no runs: run examples/demo.py first, or give --demo FOLDER")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        distill(["report", *map(str, runs), "--out", str(page)], standalone_mode=False)
        with launched() as browser:
            take(browser, page, chosen.out)


def take(browser: Any, page: Path, out: Path) -> None:
    """Write all pictures of a report into a folder."""
    for shot in SHOTS:
        content = smaller(_photograph(browser, page, shot))
        (out / f"{shot.name}.png").write_bytes(content)
        print(f"{out / shot.name}.png: {len(content):,} bytes")


def _photograph(browser: Any, file: Path, shot: Shot) -> bytes:
    page = browser.new_page(**WINDOWS[shot.window], color_scheme=shot.scheme)
    page.goto(file.as_uri())
    if shot.opened is not None:
        page.locator(f"#{shot.opened} summary").first.click()
    if shot.section is not None:
        page.locator(f"#{shot.section}").evaluate("section => section.scrollIntoView()")
    content: bytes = page.screenshot()
    page.close()
    return content


def smaller(png: bytes) -> bytes:
    """Return a PNG file with few colors."""
    file = io.BytesIO()
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.quantize(COLORS, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


if __name__ == "__main__":
    main()
