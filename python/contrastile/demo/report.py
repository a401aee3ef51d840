"""The demo's tables and its results file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from contrastile.bench import machine
from contrastile.bench.harness import Row
from contrastile.demo.train import RECALL_AT, Method, Result

MINIMUM_WIDTH = 110  # a log file has no width; narrower, the tables would wrap


def make_console() -> Console:
    console = Console(highlight=False)
    return console if console.width >= MINIMUM_WIDTH else Console(highlight=False, width=MINIMUM_WIDTH)


def by_method(results: Sequence[Result]) -> dict[Method, list[Result]]:
    found: dict[Method, list[Result]] = {}
    for result in results:
        found.setdefault(result.method, []).append(result)
    return found


def spread(values: Sequence[float], digits: int) -> str:
    """Mean, and how far the seeds lie from it at most."""
    centre = mean(values)
    widest = max(abs(value - centre) for value in values)
    return f"{centre:.{digits}f}" + (f" ±{widest:.{digits}f}" if len(values) > 1 else "")


def quality_table(results: Sequence[Result], held_out: int) -> Table:
    table = Table(title=f"Retrieval among {held_out} held-out pairs, recall@{'/'.join(map(str, RECALL_AT))} in %")
    for heading in ("trained with", "image -> text", "text -> image", "InfoNCE held out", "InfoNCE training set"):
        table.add_column(heading, justify="left" if heading == "trained with" else "right")
    for method, runs in by_method(results).items():
        table.add_row(
            method.name,
            " / ".join(spread([100 * run.held_out.image_to_text[k] for run in runs], 1) for k in RECALL_AT),
            " / ".join(spread([100 * run.held_out.text_to_image[k] for run in runs], 1) for k in RECALL_AT),
            spread([run.held_out.info_nce for run in runs], 2),
            spread([run.train.info_nce for run in runs], 2),
        )
    chance = " / ".join(f"{100 * min(1, k / held_out):.1f}" for k in RECALL_AT)
    table.add_row("chance", chance, chance, "", "", style="dim")
    return table


def cost_table(results: Sequence[Result]) -> Table:
    table = Table(title="Cost of training")
    for heading in ("trained with", "steps", "ms a step", "of it the loss", "s a run", "peak MiB"):
        table.add_column(heading, justify="left" if heading == "trained with" else "right")
    for method, runs in by_method(results).items():
        table.add_row(
            method.name,
            str(runs[0].steps),
            f"{1e3 * mean(run.step_seconds for run in runs):.1f}",
            f"{1e3 * mean(run.loss_seconds for run in runs):.2f}",
            f"{mean(run.seconds for run in runs):.1f}",
            f"{max(run.peak_bytes for run in runs) / machine.MIB:.0f}",
        )
    return table


def loss_table(rows: Sequence[Row]) -> Table:
    """Of loss-only cases, a line per N: seconds and extra MiB of each, or why there is none."""
    names = {("symmetric", "dense"): "dense PyTorch", ("symmetric", "contrastile"): "InfoNCE", ("gamma", "contrastile"): "gamma loss"}
    table = Table(title=f"The loss alone, forward + backward, {rows[0].case.dim} features, {rows[0].case.threads} threads")
    table.add_column("N", justify="right")
    for name in names.values():
        table.add_column(f"{name}, s", justify="right")
        table.add_column("MiB", justify="right")
    for size in dict.fromkeys(row.case.rows for row in rows):
        found = {(row.case.loss, row.case.implementation): row for row in rows if row.case.rows == size}
        cells = []
        for key in names:
            row = found[key]
            extra = "-" if row.extra_mib is None else f"{row.extra_mib:.0f}"
            cells += [f"{row.seconds:.3g}", extra] if row.seconds is not None else [f"{row.status}: {row.reason}", "-"]
        table.add_row(str(size), *cells)
    return table


def write_results(path: Path, settings: dict[str, Any], results: Sequence[Result], rows: Sequence[Row]) -> None:
    document = {
        "settings": settings,
        "machine": machine.describe(),
        "versions": {**machine.versions(), **settings.pop("versions")},
        "runs": [asdict(result) for result in results],
        "loss_only": [row.as_dict() for row in rows],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
