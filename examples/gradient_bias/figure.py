"""python -m examples.gradient_bias.figure RESULTS.json PICTURE.png: bias and spread over the batch, by setting."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.synthetic.figure import STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
# Methods of both examples look alike in both pictures.
STYLES = {**STYLE, "gamma, queue of 1024": STYLE["gamma, queue"], "gamma, exact": ("#888888", "x")}


def draw(rows: list[Row], picture: Path) -> None:
    """A column for each setting: bias above, spread below; a hollow marker where no bias was seen beyond chance."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = sorted({(row["noise"], row["temperature"]) for row in rows})
    figure, axes = pyplot.subplots(
        2, len(settings), figsize=(3.2 * len(settings), 6.4), squeeze=False, sharey="row", layout="constrained"
    )
    for column, setting in enumerate(settings):
        cells = [row for row in rows if (row["noise"], row["temperature"]) == setting]
        axes[0, column].set_title(f"noise {setting[0]:g}, temperature {setting[1]:g}")
        for panel, name in zip(axes[:, column], ("bias", "spread"), strict=True):
            _over_batch(panel, cells, name)
        axes[1, column].set_yscale("log")
        axes[1, column].set_xlabel("batch")
    axes[0, 0].set_ylabel("bias / |exact gradient|")
    axes[1, 0].set_ylabel("spread / |exact gradient|")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STYLES), fontsize=9)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def _over_batch(panel: Axes, rows: list[Row], name: str) -> None:
    for estimator in dict.fromkeys(row["estimator"] for row in rows):
        colour, marker = STYLES[estimator]
        line = sorted((row for row in rows if row["estimator"] == estimator), key=lambda row: row["batch"])
        batches = [row["batch"] for row in line]
        panel.plot(batches, [row[name] for row in line], marker=marker, color=colour, label=estimator, markersize=6)
        unseen = [row for row in line if name == "bias" and row["bias"] < 2 * row["chance"]]
        panel.plot([row["batch"] for row in unseen], [row[name] for row in unseen], marker, color=colour, mfc="white")
    panel.set_xscale("log", base=2)
    every = sorted({row["batch"] for row in rows})
    panel.set_xticks(every, [str(batch) for batch in every])


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text())["rows"], Path(sys.argv[2]))
