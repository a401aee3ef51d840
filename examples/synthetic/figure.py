"""python -m examples.synthetic.figure RESULTS.json PICTURE.png: every run of two cells, and the sweep's medians."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from contrastile.bench.plot import COLOURS, MARKERS

from examples.synthetic.cells import HEADLINE, MORE_SAMPLES
from examples.synthetic.named import METHODS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
STYLE = {
    name: (COLOURS[i % len(COLOURS)], MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]) for i, name in enumerate(METHODS)
}


def draw(rows: list[Row], picture: Path) -> None:
    """At the left every run of two cells, a dot each; at the right recovery and loss over the batch by setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    headline, more_samples = ([row for row in rows if cell.items() <= row.items()] for cell in (HEADLINE, MORE_SAMPLES))
    swept = [row for row in rows if row not in more_samples]
    settings = sorted({(row["noise"], row["temperature"]) for row in swept})
    figure, axes = pyplot.subplots(
        2, len(settings) + 2, figsize=(3.1 * (len(settings) + 2), 7), squeeze=False, layout="constrained"
    )
    for panel in axes[:, :2].flat:
        panel.remove()
    grid = axes[0, 0].get_gridspec()
    _runs(figure.add_subplot(grid[0, :2]), headline)
    _runs(figure.add_subplot(grid[1, :2]), more_samples)
    for column, setting in enumerate(settings, start=2):
        cells = [row for row in swept if (row["noise"], row["temperature"]) == setting]
        axes[0, column].set_title(f"noise {setting[0]:g}, temperature {setting[1]:g}")
        _over_batch(axes[0, column], cells, "recovery")
        _over_batch(axes[1, column], cells, "best_loss")
        axes[1, column].set_xlabel("batch")
    axes[0, 2].set_ylabel("recovery, optimum 1")
    axes[1, 2].set_ylabel("InfoNCE of all pairs at the best scale, nats")
    axes[0, -1].legend(fontsize=7, loc="lower right")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def _runs(panel: Axes, rows: list[Row]) -> None:
    for place, row in enumerate(rows):
        colour, marker = STYLE[row["method"]]
        panel.plot([place] * len(row["recovery"]), row["recovery"], marker, color=colour, alpha=0.5)
        panel.plot([place - 0.3, place + 0.3], [median(row["recovery"])] * 2, color=colour)
    panel.axhline(1, color="#888888", linewidth=0.8)
    panel.set_xticks(range(len(rows)), [row["method"] for row in rows], rotation=40, ha="right")
    panel.set_ylabel("recovery of the latent, optimum 1")
    if rows:
        setting = rows[0]
        panel.set_title(
            f"noise {setting['noise']:g}, temperature {setting['temperature']:g}, batch {setting['batch']}, "
            f"{setting['samples']} pairs:\n{len(setting['recovery'])} initialisations, median as a line"
        )


def _over_batch(panel: Axes, rows: list[Row], name: str) -> None:
    for method, (colour, marker) in STYLE.items():
        line = sorted((row["batch"], row[name]) for row in rows if row["method"] == method)
        if not line:
            continue
        batches, values = zip(*line, strict=True)
        panel.plot(batches, [median(runs) for runs in values], marker=marker, color=colour, label=method, markersize=4)
        panel.fill_between(batches, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.12)
    panel.set_xscale("log", base=2)
    panel.set_xticks(sorted({row["batch"] for row in rows}), [str(b) for b in sorted({row["batch"] for row in rows})])


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text())["cells"], Path(sys.argv[2]))
