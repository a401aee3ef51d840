"""The table: means over seeds with their 95 % confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from examples.two_tower.groups import NAMES
from examples.two_tower.objectives import CONTRASTS, STRUCTURES

SHARES = (
    *("zero-shot", "1-shot", "5-shot", "10-shot", "linear probe"),
    *("image to text R@1", "image to text R@10", "text to image R@1", "text to image R@10"),
)
WIDTH = 170
# Student's t, two-sided 95 %, of 1, 2, ... degrees of freedom; of more than these the last is a little too wide.
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)

Row = dict[str, Any]


def by_kind(rows: Sequence[Row]) -> dict[tuple[str, str, int | str], list[Row]]:
    """Rows by contrast, structure and batch, in this order; what is left to differ is the seed."""
    kinds: dict[tuple[str, str, int | str], list[Row]] = {}
    for row in sorted(rows, key=_place):
        kinds.setdefault((row["contrast"], row["structure"], row["batch"]), []).append(row)
    return kinds


def _place(row: Row) -> tuple[float, ...]:
    batch = math.inf if row["batch"] == "all" else row["batch"]
    return CONTRASTS.index(row["contrast"]), STRUCTURES.index(row["structure"]), batch, row["seed"]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % confidence interval over seeds; 0 for a single one."""
    if len(values) == 1:
        return values[0], 0.0
    quantile = T_95[min(len(values) - 1, len(T_95)) - 1]
    return mean(values), quantile * stdev(values) / len(values) ** 0.5


def report(rows: Sequence[Row], held_out: int) -> None:
    table = Table(title="Families that were held out, %: mean over seeds and 95 % confidence interval")
    for name in ("contrast", "structure", "batch", "seeds"):
        table.add_column(name, no_wrap=True)
    for name in (*SHARES, "gap", "s a run"):
        table.add_column(name, justify="right")
    for (contrast, structure, batch), runs in by_kind(rows).items():
        table.add_row(
            *(contrast, structure, str(batch), str(len(runs))),
            *(_percent([run[name] for run in runs]) for name in SHARES),
            f"{mean(run['gap'] for run in runs):.2f}",
            f"{mean(run['seconds'] for run in runs):.0f}",
        )
    guess = [1 / len(NAMES)] * 5 + [1 / held_out, 10 / held_out] * 2
    table.add_row("chance", "", "", "", *(f"{100 * share:.1f}" for share in guess), "", "", style="dim")
    Console(width=WIDTH).print(
        table,
        "The interval is over seeds of start, order and augmentation alone; the held-out families are the same ones.\n"
        "gap: distance between the means of both modalities. s a run: of one core, training alone.",
    )


def _percent(values: Sequence[float]) -> str:
    centre, half = interval(values)
    return f"{100 * centre:.1f}" + (f"±{100 * half:.1f}" if len(values) > 1 else "")
