"""Tables for the terminal, and the results file.

    {"machine": {...}, "versions": {...}, "runs": [{"command", "date", "rows": [...], "promises": [...]}]}

A file belongs to one machine. A run replaces the earlier run of the same command.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contrastile.bench import machine
from contrastile.bench.harness import Row
from contrastile.bench.promises import Promise
from rich.console import Console
from rich.table import Table

CONSOLE = Console()


def print_row(row: Row) -> None:
    """One line as soon as a case is done."""
    figures = " ".join(_figures(row)) if row.status != "measured" else f"{row.seconds:.4g} s" if row.seconds else "done"
    CONSOLE.print(f"{row.case.loss} {row.case.label} N = {_size(row)}: {figures}", highlight=False)


def print_promise(promise: Promise) -> None:
    CONSOLE.print(f"{promise.name}: {promise.figure_text} ({promise.bound_text}) {promise.verdict}", highlight=False)


def row_table(rows: Sequence[Row]) -> Table:
    table = Table(title="Forward + backward", title_justify="left")
    table.add_column("loss")
    table.add_column("implementation")
    headings = ("N", "seconds", "in products", "FMA peak", "MiB extra", "loss error", "gradient error")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row.case.loss, row.case.label, _size(row), *_figures(row))
    return table


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader of the table must know, each once."""
    measured = [row for row in rows if row.status == "measured"]
    found = {
        "in products: seconds / seconds of one N x M x D product of the same repetition, on a CPU in float32",
        "FMA peak: flop of the fused algorithm's products / (seconds x peak measured around them)",
        "MiB extra: peak of the process beyond inputs, loss and gradients, on a device what PyTorch gave out there",
    }
    found |= {row.no_peak for row in measured if row.no_peak}
    found |= {f"memory: {row.memory_note}" for row in measured if row.memory_note}
    found |= {f"errors: against float64 at N = {row.error_rows}" for row in measured if row.error_rows}
    return sorted(found)


def promise_table(promises: Sequence[Promise]) -> Table:
    table = Table(title="Performance promises", title_justify="left")
    table.add_column("promise")
    table.add_column("figure", justify="right")
    table.add_column("bound", justify="right")
    table.add_column("")
    for promise in promises:
        colour = "green" if promise.holds else "red"
        table.add_row(promise.name, promise.figure_text, promise.bound_text, f"[{colour}]{promise.verdict}[/]")
    return table


def write_results(path: Path, command: str, rows: Sequence[Row], promises: Sequence[Promise] = ()) -> None:
    """Add a run to the file, or replace the run of the same command.

    Raises:
        ValueError: the file holds figures of another machine.
    """
    here = machine.describe()
    document: dict[str, Any] = {"machine": here, "versions": machine.versions(), "runs": []}
    if path.exists():
        earlier = json.loads(path.read_text())
        if earlier["machine"] != here:
            raise ValueError(
                f"{path} holds figures of another machine ({earlier['machine']['cpu']}): choose another file"
            )
        document["runs"] = [run for run in earlier["runs"] if run["command"] != command]
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    document["runs"].append(
        {
            "command": command,
            "date": date,
            "rows": [row.as_dict() for row in rows],
            "promises": [promise.as_dict() for promise in promises],
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def _size(row: Row) -> str:
    return f"{row.case.rows}" if row.case.rows == row.case.cols else f"{row.case.rows} x {row.case.cols}"


def _figures(row: Row) -> tuple[str, ...]:
    if row.status != "measured":
        return (f"{row.status}: {row.reason}",)
    return (
        _text(row.seconds, ".4g"),
        _text(row.in_products, ".2f"),
        _text(row.fma_fraction, ".1%"),
        _text(row.extra_mib, ".0f"),
        _text(row.loss_error, ".0e"),
        _text(row.gradient_error, ".0e"),
    )


def _text(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
