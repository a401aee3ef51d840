"""The table: means over seeds with their 95 % confidence intervals, and what a structure adds to the base."""

from __future__ import annotations

from collections.abc import Sequence
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
MEASURED = tuple(name for task in TASKS for name in (task, *(f"{task}: {sort}" for sort in SORTS[task])))
WIDTH = 170

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
    table = Table(title="Right answers about held-out combinations, %: mean over seeds and 95 % confidence interval")
    table.add_column("row", no_wrap=True)
    for name in ("seeds", *(name.replace(": ", ":\n") for name in MEASURED), "s a run"):
        table.add_column(name, justify="right")
    for structure, runs in kinds.items():
        seconds = mean(run.get("pretraining seconds", 0) + run["fine-tuning seconds"] for run in runs)
        shares = (percent([run[name] for run in runs]) for name in MEASURED)
        table.add_row(
            structure, str(len(runs)), *shares, f"{seconds:.0f}", style="dim" if structure == TEXT_ONLY else None
        )
    console = Console(width=WIDTH)
    console.print(table)
    if differences := _differences(rows, list(kinds)):
        console.print(differences)
    console.print(
        "The interval is over seeds of start, order and augmentation alone; the examples are the same ones.\n"
        f"{TEXT_ONLY}: the same model and heads fine-tuned without pictures: what can be guessed.\n"
        "s a run: of one core, pre-training and fine-tuning."
    )


def _differences(rows: Sequence[Row], structures: Sequence[str]) -> Table | None:
    table = Table(title="Points above the base with the same seed")
    for name in ("row", "seeds", *TASKS):
        table.add_column(name, justify="right")
    for structure in structures:
        if structure not in (TEXT_ONLY, "base") and (seeds := len(gains(rows, structure, TASKS[0]))):
            table.add_row(structure, str(seeds), *(percent(gains(rows, structure, task)) for task in TASKS))
    return table if table.row_count else None
