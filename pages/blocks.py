"""Content of a page, independent of HTML: sections of texts, tables, plots and pictures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """Cell of a table."""

    text: str
    value: float | None = None
    """Number by which a column is sorted; None sorts by the text."""
    heat: float | None = None
    """Strength of the background color in [0, 1]; None means no color."""


@dataclass(frozen=True)
class Row:
    """Row of a table."""

    cells: tuple[Cell, ...]
    group: int | None = None
    """Index of the group, of runs or a store, that the row is about; hidden together with it."""


@dataclass(frozen=True)
class Table:
    """Table whose first column names its rows."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[Row, ...]
    folded: bool = False
    """Show the table only after a click on its caption."""
    group: int | None = None


@dataclass(frozen=True)
class Series:
    """Line of a plot."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    band: tuple[tuple[float, float], ...] = ()
    """Lowest and highest value at each x; empty for a line without a band."""
    style: int = 0
    """Index of its color and dashes."""
    group: int | None = None


@dataclass(frozen=True)
class Plot:
    """Plot of one or more lines, shown with its numbers as a table."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    group: int | None = None
    diagonal: bool = False
    """Draw the line y = x across the unit square."""


@dataclass(frozen=True)
class Text:
    """Paragraph."""

    text: str
    is_problem: bool = False


@dataclass(frozen=True)
class Code:
    """Preformatted text, shown after a click on its title."""

    title: str
    text: str
    group: int | None = None


@dataclass(frozen=True)
class Caption:
    """Lines below a picture, under a name."""

    name: str
    lines: tuple[str, ...]
    is_right: bool
    """True for lines in the color for right answers, False for those in the color for wrong ones."""
    group: int | None = None


@dataclass(frozen=True)
class Picture:
    """Image with captions."""

    title: str
    png: bytes | None
    """Content of a PNG file; None shows the captions alone."""
    captions: tuple[Caption, ...] = ()


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side."""

    title: str
    pictures: tuple[Picture, ...]


Block = Text | Table | Plot | Code | Gallery


@dataclass(frozen=True)
class Section:
    """Section of the page; left out if it has no blocks."""

    name: str
    """Anchor of the section in the page."""
    title: str
    blocks: tuple[Block, ...]


def text(value: object) -> Cell:
    """Return a cell of plain text."""
    return Cell(str(value))


def percent(value: float | None, *, heat: float | None = None) -> Cell:
    """Return a cell of a share in percent, `-` for None."""
    return Cell("-") if value is None else Cell(f"{value:.2%}", value, heat)


def points(value: float | None, *, heat: float | None = None) -> Cell:
    """Return a cell of a difference of two shares in percentage points, with its sign; `-` for None."""
    return Cell("-") if value is None else Cell(f"{100 * value:+.2f}", value, heat)


def number(value: float | None, digits: int = 3, *, heat: float | None = None) -> Cell:
    """Return a cell of a number, `-` for None."""
    return Cell("-") if value is None else Cell(f"{value:,.{digits}f}", value, heat)


def count(value: int, *, heat: float | None = None) -> Cell:
    """Return a cell of an integer."""
    return Cell(f"{value:,}", float(value), heat)
