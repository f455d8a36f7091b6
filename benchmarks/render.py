"""Write the tables of README.md and docs/benchmarks.md from the rows in benchmarks/results.

    python benchmarks/render.py [--check]

The text between `<!-- rows: NAME -->` and `<!-- end -->` is replaced; all other text is kept. NAME is a table
of `_tables.py`, or `machine of FILE` for hardware, versions and date of `results/FILE.json`. Where that file
is missing, the page says so. With --check, nothing is written, and the exit status is 1 if a page differs
from its rows.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from _tables import TABLES, caption

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/benchmarks.md")
BLOCK = re.compile(r"(<!-- rows: (.+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def block(name: str) -> str:
    """Return the Markdown of a table or of a machine's description, or a note if there are no rows yet."""
    if not name.startswith("machine of ") and name not in TABLES:
        sys.exit(f"No table {name!r}. Known: {', '.join(TABLES)}, machine of FILE.")
    try:
        lines = TABLES[name]() if name in TABLES else caption(name.removeprefix("machine of "))
    except FileNotFoundError as error:
        lines = [f"Not run yet: there is no `benchmarks/results/{Path(error.filename).name}`."]
    return "\n".join(["", *lines, "", ""])


def rendered(text: str) -> str:
    """Return a page with every block regenerated."""
    return BLOCK.sub(lambda found: found[1] + block(found[2]) + found[4], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if a page differs")
    check = parser.parse_args().check
    differing = []
    for name in PAGES:
        path = ROOT / name
        text = path.read_text()
        new = rendered(text)
        if new != text:
            differing.append(name)
            if not check:
                path.write_text(new)
    verb = "differs from its rows; run python benchmarks/render.py" if check else "written"
    for name in differing:
        print(f"{name}: {verb}")
    sys.exit(1 if check and differing else 0)


if __name__ == "__main__":
    main()
