"""Draw the growth of epoch times from the rows that `python benchmarks/train.py --json rows.json` wrote.

python benchmarks/_train_plot.py rows.json docs/growth.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "coursepack"

from matplotlib import pyplot as plt  # noqa: E402 - after the backend is chosen

NAMES = {"N": "samples, N", "K": "teachers, K", "V": "views, V", "C": "classes, C"}


def main() -> None:
    rows = json.loads(Path(sys.argv[1]).read_text())["rows"]
    cells = [row for row in rows if row["id"].startswith("growth: ")]
    base = cells[0]["config"]
    figure, panels = plt.subplots(1, len(NAMES), figsize=(9, 2.4), layout="constrained", sharey=True)
    for axes, (key, label) in zip(panels, NAMES.items(), strict=True):
        others = [name for name in NAMES if name != key]
        line = [row for row in cells if all(row["config"][name] == base[name] for name in others)]
        line.sort(key=lambda row: row["config"][key])
        places = [row["config"][key] for row in line]
        axes.plot(places, [row["value"] for row in line], "o-", color="#d1603d", markersize=4)
        axes.fill_between(
            places, [row["low"] for row in line], [row["high"] for row in line], color="#d1603d", alpha=0.2
        )
        axes.set_xscale("log")
        axes.set_xticks(places, [f"{place:,}" for place in places])
        axes.minorticks_off()
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("us per sample")
    figure.savefig(sys.argv[2], metadata={"Date": None})


if __name__ == "__main__":
    main()
