"""Draw the time of a step from the rows that `python benchmarks/loss.py --json rows.json` wrote.

python benchmarks/_loss_plot.py rows.json docs/loss.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "coursepack"

from matplotlib import pyplot as plt  # noqa: E402 - after the backend is chosen

VARIANTS = ("naive", "analytic", "compile", "ours", "floor")
COLORS = ("#b0b0b0", "#8fa8c8", "#5b84b1", "#d1603d", "#222222")


def main() -> None:
    rows = json.loads(Path(sys.argv[1]).read_text())["rows"]
    cells: dict[str, dict[str, float]] = {}
    for entry in rows:
        config, name = entry["config"], entry["id"].split(") ", 1)[-1]
        which = name.removeprefix("1 thread ")
        if config.get("threads") == 1 and entry["unit"] == "us" and which in VARIANTS:
            label = f"N={config['N']}\nC={config['C']}\nK={config['K']}"
            values = config["N"] * config["C"] * (config["K"] + 1)
            cells.setdefault(label, {})[which] = 1000 * entry["value"] / values
    figure, axes = plt.subplots(figsize=(7.5, 3.2), layout="constrained")
    width = 0.8 / len(VARIANTS)
    for i, (which, color) in enumerate(zip(VARIANTS, COLORS, strict=True)):
        places = [cell + (i - (len(VARIANTS) - 1) / 2) * width for cell in range(len(cells))]
        axes.bar(places, [cell.get(which, 0) for cell in cells.values()], width, color=color, label=which)
    axes.set_xticks(range(len(cells)), list(cells))
    axes.set_yscale("log")
    axes.set_ylabel("ns per logit read, 1 thread")
    axes.legend(ncols=len(VARIANTS), frameon=False, fontsize="small", loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(sys.argv[2], metadata={"Date": None})


if __name__ == "__main__":
    main()
