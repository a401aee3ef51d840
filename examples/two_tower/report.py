"""The table: means over seeds with their 95 % confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from examples.common.intervals import percent
from examples.two_tower.groups import NAMES
from examples.two_tower.objectives import CONTRASTS, STRUCTURES

SHARES = (
    *("zero-shot", "1-shot", "5-shot", "10-shot", "linear probe"),
    *("image to text R@1", "image to text R@10", "text to image R@1", "text to image R@10"),
)
WIDTH = 170

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


def report(rows: Sequence[Row], held_out: int) -> None:
    table = Table(title="Families that were held out, %: mean over seeds and 95 % confidence interval")
    for name in ("contrast", "structure", "batch", "seeds"):
        table.add_column(name, no_wrap=True)
    for name in (*SHARES, "gap", "s a run"):
        table.add_column(name, justify="right")
    for (contrast, structure, batch), runs in by_kind(rows).items():
        table.add_row(
            *(contrast, structure, str(batch), str(len(runs))),
            *(percent([run[name] for run in runs]) for name in SHARES),
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
