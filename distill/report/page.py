"""Page of a report: sections rendered as one HTML file that loads nothing else.

The template escapes all texts. A content security policy allows no connection, and no script but the page's
own, by its digest.
"""

from __future__ import annotations

import base64
import hashlib
from typing import TYPE_CHECKING

from coursepack.distill.report.assets import SCRIPT, STYLE, TEMPLATE
from coursepack.distill.report.blocks import Cell, Plot, Row, Table
from coursepack.distill.report.draw import draw, style_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coursepack.distill.report.blocks import Section
    from coursepack.distill.report.reading import RunGroup

MOST_NUMBERS = 100
"""Maximum number of rows in the table of a plot's numbers, which then has every second, third, ... point."""


def render_page(title: str, summary: str, sections: Sequence[Section], groups: Sequence[RunGroup]) -> str:
    """Return the page as HTML.

    Args:
        title: title of the page.
        summary: paragraph below the title.
        sections: sections in order; those without blocks are left out.
        groups: groups of runs that the reader can hide.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    plots = (f"plot{index}" for index in range(1 << 20))
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(TEMPLATE).render(
        title=title,
        summary=summary,
        sections=[section for section in sections if section.blocks],
        groups=groups,
        policy=_policy(),
        style=Markup(STYLE),
        script=Markup(SCRIPT),
        footer="Made by distill report. Tables are sorted by a click on a column's name.",
        kind=lambda block: type(block).__name__,
        drawing=lambda plot: Markup(draw(plot, next(plots))),
        style_of=style_of,
        numbers=numbers,
    )


def numbers(plot: Plot) -> Table:
    """Return the points of a plot as a table, one row for each x."""
    columns = [dict(zip(line.x, line.y, strict=True)) for line in plot.series]
    places = sorted({x for line in plot.series for x in line.x})
    step = -(-len(places) // MOST_NUMBERS) or 1
    kept = [x for index, x in enumerate(places) if index % step == 0 or index == len(places) - 1]
    rows = tuple(Row((Cell(f"{x:g}", x), *(_cell(column.get(x)) for column in columns))) for x in kept)
    return Table(plot.title, (plot.x_label, *(line.name for line in plot.series)), rows)


def _cell(value: float | None) -> Cell:
    return Cell("-") if value is None else Cell(f"{value:.4g}", value)


def _policy() -> str:
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
