"""Plots as SVG for a page: text stays text, and the colors of axes are those of the page."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coursepack.pages.blocks import Plot

COLORS = ("#2f7fc1", "#c2620e", "#2e8b57", "#8e5fc9", "#d1495b", "#1f8a91", "#b8509a", "#8a7a1f")
"""Colors of lines, with a contrast of at least 3 to the light and the dark background."""
DASHES: tuple[tuple[float, ...], ...] = ((), (6, 2), (2, 2), (8, 2, 2, 2))
"""Lengths of dashes and gaps, in points; lines of different styles differ without their colors too."""
WIDTH, HEIGHT = 4.0, 2.5
"""Size in inches, at which texts are 11 pixels high on a phone and 16 at the full width of a figure."""
MAX_MARKED = 40
"""Maximum number of points of a line with a marker at each."""
INK = "#010203"
"""Color that stands for the page's text color while a plot is drawn."""
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "font.size": 10.0,
    "lines.scale_dashes": False,
}


def style_of(index: int) -> tuple[str, tuple[float, ...]]:
    """Return the color and the dashes of the line with an index; the first 32 are different."""
    return COLORS[index % len(COLORS)], DASHES[(index + index // len(COLORS)) % len(DASHES)]


def draw(plot: Plot, name: str) -> str:
    """Return a plot as an SVG element without a title, names of lines or any other text from outside.

    Lines of a group have identifiers that end in `-group-INDEX`.

    Args:
        plot: the plot.
        name: prefix of the identifiers in the element, unique in the page.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with mpl.rc_context({**SETTINGS, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        if plot.diagonal:
            axes.plot((0, 1), (0, 1), color=INK, linewidth=0.8, alpha=0.6)
        for index, line in enumerate(plot.series):
            color, dashes = style_of(line.style)
            suffix = "" if line.group is None else f"-group-{line.group}"
            if line.band:
                low, high = zip(*line.band, strict=True)
                axes.fill_between(
                    line.x, low, high, color=color, alpha=0.18, linewidth=0, gid=f"band{index}{suffix}"
                )
            marker = "o" if len(line.x) <= MAX_MARKED else ""
            axes.plot(
                line.x, line.y, color=color, linewidth=1.6, linestyle=(0, dashes) if dashes else "-",
                marker=marker, markersize=2.5, gid=f"line{index}{suffix}",
            )  # fmt: skip
        _widen(axes)
        axes.set_xlabel(plot.x_label)
        axes.set_ylabel(plot.y_label)
        if plot.x_label == "epoch":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _embedded(file.getvalue(), name)


def _widen(axes: Any) -> None:
    """Give lines that are constant up to rounding errors a range of values of a tenth of their size."""
    low, high = axes.get_ylim()
    middle = (low + high) / 2
    if high - low < 1e-4 * max(abs(middle), 1.0):
        half = max(abs(middle), 1.0) / 20
        axes.set_ylim(middle - half, middle + half)


def _embedded(svg: str, name: str) -> str:
    """Return the element of an SVG file, with identifiers that are unique in the page."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.S)
    element = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\1{name}-", element)
    return element.replace(INK, "currentColor").replace(
        "<svg ", '<svg aria-hidden="true" focusable="false" ', 1
    )
