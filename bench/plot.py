"""Time and memory against N, one line an implementation.

python -m contrastile.bench.plot RESULTS.json PICTURE.png

Rows of several (D, dtype, threads, device) give a picture each, PICTURE-512-bfloat16-2-cuda.png and so on.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from contrastile.bench.implementations import IMPLEMENTATIONS
from contrastile.bench.machine import MIB

# Okabe and Ito's palette, told apart by the colour-blind; marker and direct label say the same again.
COLOURS = (
    *("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00"),
    *("#56B4E9", "#8C6D31", "#666666", "#B2182B", "#542788", "#7FBC41"),
)
MARKERS = "osD^vP*X<>hd"
LABEL_GAP = 0.05  # of the axis height, between two labels


Setup = tuple[int, str, int, str]  # D, dtype, threads, device


def plot_results(results: Path, picture: Path) -> list[Path]:
    """Pictures of all rows of a results file, one a setup."""
    document = json.loads(results.read_text())
    gpu = document["machine"].get("gpu", {}).get("name")
    by_setup: dict[Setup, list[dict[str, Any]]] = defaultdict(list)
    for run in document["runs"]:
        for row in run["rows"]:
            if row["status"] == "measured":
                by_setup[_setup(row)].append(row)
    if len(by_setup) < 2:
        plot([row for rows in by_setup.values() for row in rows], picture, gpu)
        return [picture]
    pictures = {setup: picture.with_stem("-".join(map(str, (picture.stem, *setup)))) for setup in by_setup}
    for setup, rows in by_setup.items():
        plot(rows, pictures[setup], gpu)
    return list(pictures.values())


def _setup(row: dict[str, Any]) -> Setup:
    return row["dim"], row["dtype"], row["threads"], row.get("device", "cpu")


def plot(rows: Sequence[dict[str, Any]], picture: Path, gpu: str | None = None) -> None:
    """Draw rows of a results file, one row of panels per loss: nanoseconds / N^2 and extra MiB, both over N.

    gpu is the name of what the rows call "cuda".
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    square = [row for row in rows if row["status"] == "measured" and row["rows"] == row["cols"]]
    losses = [loss for loss in dict.fromkeys(row["loss"] for row in square) if any(_times(square, loss))]
    if not losses:
        raise ValueError("no measured times to plot")
    setups = {_setup(row) for row in square}
    if len(setups) > 1:
        raise ValueError(f"one picture shows one (D, dtype, threads, device), these rows are of {sorted(setups)}")
    ((dim, dtype, threads, device),) = setups
    place = f"{threads} threads" if device == "cpu" else gpu or device
    figure, panels = plt.subplots(len(losses), 2, figsize=(11, 4.2 * len(losses)), squeeze=False)
    for (time_axis, memory_axis), loss in zip(panels, losses, strict=True):
        _draw(time_axis, _times(square, loss), f"{loss}: ns / N²")
        _draw(memory_axis, _memory(square, loss), f"{loss}: extra MiB")
    for axis in panels[-1]:
        axis.set_xlabel(f"N   (D = {dim}, {dtype}, {place})")
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150)
    plt.close(figure)


Points = dict[str, list[tuple[int, float]]]


def _times(rows: Iterable[dict[str, Any]], loss: str) -> Points:
    return _points(rows, loss, lambda row: row["seconds"] and row["seconds"] * 1e9 / row["rows"] ** 2)


def _memory(rows: Iterable[dict[str, Any]], loss: str) -> Points:
    # A log axis has no zero: below one MiB is drawn as one.
    return _points(rows, loss, lambda row: None if row["extra_bytes"] is None else max(1.0, row["extra_bytes"] / MIB))


def _points(rows: Iterable[dict[str, Any]], loss: str, value_of: Any) -> Points:
    """Values over N by label. A size measured twice (in company for the promises, alone) keeps its last."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row["loss"] == loss and (value := value_of(row)) is not None:
            label = f"{row['implementation']}[{row['backend']}]" if row["backend"] else row["implementation"]
            found[label][row["rows"]] = value
    return {label: sorted(values.items()) for label, values in found.items()}


def _draw(axis: Any, points: Points, title: str) -> None:
    from matplotlib.ticker import LogFormatter

    names = list(IMPLEMENTATIONS)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    for label, line in points.items():
        style = names.index(label.partition("[")[0])
        colour, marker = COLOURS[style], MARKERS[style]
        width = 2.5 if style == 0 else 1.4
        axis.plot(*zip(*line, strict=True), color=colour, marker=marker, linewidth=width, markersize=5)
    sizes = sorted({n for line in points.values() for n, _ in line})
    axis.set_xticks(sizes, [str(n) for n in sizes], fontsize=8)
    axis.xaxis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    axis.tick_params(axis="y", which="both", labelsize=8)
    axis.set_title(title, loc="left", fontsize=10)
    axis.grid(True, which="major", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    _label_line_ends(axis, points, names)


def _label_line_ends(axis: Any, points: Points, names: list[str]) -> None:
    """Labels at the right edge, pushed apart from the bottom up where lines end together."""
    to_height = axis.transData + axis.transAxes.inverted()
    ends = sorted((to_height.transform(line[-1])[1], label) for label, line in points.items())
    lowest = float("-inf")
    for height, label in ends:
        lowest = max(height, lowest + LABEL_GAP)
        colour = COLOURS[names.index(label.partition("[")[0])]
        axis.text(1.02, lowest, label, color=colour, fontsize=8, va="center", transform=axis.transAxes)


if __name__ == "__main__":
    for path in plot_results(Path(sys.argv[1]), Path(sys.argv[2])):
        print(path)
