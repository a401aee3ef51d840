"""The table: means over seeds with their 95 % confidence intervals, and what a structure adds to the base."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from examples.common.intervals import percent
from examples.fusion.language import HYPOTHESES, QUESTIONS, STATEMENTS
from examples.fusion.objectives import STRUCTURES
from examples.fusion.questions import TASKS
from examples.fusion.train import TEXT_ONLY

ROWS = (TEXT_ONLY, *STRUCTURES)
SORTS = dict(zip(TASKS, (QUESTIONS, STATEMENTS, HYPOTHESES), strict=True))
WIDTH = 100

Row = dict[str, Any]


def by_structure(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows in the order of ROWS, seeds in theirs."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (ROWS.index(row["structure"]), row["seed"])):
        found.setdefault(row["structure"], []).append(row)
    return found


def gains(rows: Sequence[Row], structure: str, name: str) -> list[float]:
    """What the structure has over the base in `name`, for every seed that both have."""
    kinds = by_structure(rows)
    base = {row["seed"]: row[name] for row in kinds.get("base", [])}
    return [row[name] - base[row["seed"]] for row in kinds[structure] if row["seed"] in base]


def report(rows: Sequence[Row]) -> None:
    kinds = by_structure(rows)
    console = Console(width=WIDTH)
    console.print(_shares(kinds, "Right answers about held-out combinations, %", TASKS))
    for task in TASKS:
        console.print(_shares(kinds, f"{task.capitalize()}, by what is asked for", SORTS[task], f"{task}: "))
    if differences := _differences(rows, list(kinds)):
        console.print(differences)
    seconds = (
        f"{structure} {mean(run.get('pretraining seconds', 0) + run['fine-tuning seconds'] for run in runs):.0f}"
        for structure, runs in kinds.items()
    )
    console.print(
        "Mean over seeds and half of its 95 % confidence interval, which is over seeds of start, order and\n"
        "augmentation alone; the examples are the same ones.\n"
        f"{TEXT_ONLY}: the same model and heads fine-tuned without pictures: what can be guessed.\n"
        f"Seconds a run, of one core, pre-training and fine-tuning: {', '.join(seconds)}."
    )


def _shares(kinds: dict[str, list[Row]], title: str, columns: Iterable[str], prefix: str = "") -> Table:
    """What is measured under the prefix and a column's name."""
    columns = list(columns)
    table = Table(title=title, title_justify="left")
    table.add_column("row", no_wrap=True)
    for name in ("seeds", *columns):
        table.add_column(name, justify="right", no_wrap=True)
    for structure, runs in kinds.items():
        shares = (percent([run[prefix + name] for run in runs]) for name in columns)
        table.add_row(structure, str(len(runs)), *shares, style="dim" if structure == TEXT_ONLY else None)
    return table


def _differences(rows: Sequence[Row], structures: Sequence[str]) -> Table | None:
    table = Table(title="Points above the base with the same seed", title_justify="left")
    for name in ("row", "seeds", *TASKS):
        table.add_column(name, justify="right")
    for structure in structures:
        if structure not in (TEXT_ONLY, "base") and (seeds := len(gains(rows, structure, TASKS[0]))):
            table.add_row(structure, str(seeds), *(percent(gains(rows, structure, task)) for task in TASKS))
    return table if table.row_count else None
