"""Sections rendered as one HTML file that loads nothing else.

The template escapes all texts. A content security policy allows no connection, and no script but the page's
own, by its digest.
"""

from __future__ import annotations

import base64
import hashlib
from typing import TYPE_CHECKING

from coursepack.pages.assets import SCRIPT, STYLE, TEMPLATE
from coursepack.pages.blocks import Cell, Gallery, Plot, Row, Table
from coursepack.pages.draw import draw, style_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coursepack.pages.blocks import Section

MAX_NUMBERS = 100
"""Maximum number of rows in the table of a plot's numbers, which then has every second, third, ... point."""


def render_page(
    title: str, summary: str, sections: Sequence[Section], groups: Mapping[int, str], made_by: str
) -> str:
    """Return the page as HTML.

    Args:
        title: title of the page.
        summary: paragraph below the title.
        sections: sections in order; those without blocks are left out.
        groups: labels by index of the groups that the reader can hide.
        made_by: command that made the page.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    shown = [section for section in sections if section.blocks]
    pictures = any(isinstance(block, Gallery) for section in shown for block in section.blocks)
    plots = (f"plot{index}" for index in range(1 << 20))
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(TEMPLATE).render(
        title=title,
        summary=summary,
        sections=shown,
        groups=groups,
        policy=_policy(with_pictures=pictures),
        style=Markup(STYLE),
        script=Markup(SCRIPT),
        footer=f"Made by {made_by}. Tables are sorted by a click on a column's name.",
        kind=lambda block: type(block).__name__,
        drawing=lambda plot: Markup(draw(plot, next(plots))),
        style_of=style_of,
        numbers=numbers,
        address=lambda png: "data:image/png;base64," + base64.b64encode(png).decode(),
    )


def numbers(plot: Plot) -> Table:
    """Return the points of a plot as a table, one row for each x."""
    columns = [dict(zip(line.x, line.y, strict=True)) for line in plot.series]
    places = sorted({x for line in plot.series for x in line.x})
    step = -(-len(places) // MAX_NUMBERS) or 1
    kept = [x for index, x in enumerate(places) if index % step == 0 or index == len(places) - 1]
    rows = tuple(Row((Cell(f"{x:g}", x), *(_cell(column.get(x)) for column in columns))) for x in kept)
    return Table(plot.title, (plot.x_label, *(line.name for line in plot.series)), rows)


def _cell(value: float | None) -> Cell:
    return Cell("-") if value is None else Cell(f"{value:.4g}", value)


def _policy(*, with_pictures: bool) -> str:
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    images = "img-src data:; " if with_pictures else ""
    return (
        f"default-src 'none'; {images}style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'"
    )
