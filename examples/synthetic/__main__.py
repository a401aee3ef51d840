"""python -m examples.synthetic [--headline] [--out JSON] [--figure PICTURE]: trains, prints, writes, draws."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from examples.synthetic.cells import headline, more_samples, sweep
from examples.synthetic.named import METHODS, SWEPT
from examples.synthetic.problem import Problem
from examples.synthetic.train import measure

RESULTS = Path("out/synthetic.json")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.synthetic", description=__doc__)
    parser.add_argument(
        "--headline",
        action="store_true",
        help="only the cell of the claim, and the full batch beside it: a few minutes",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=[*SWEPT],
        metavar="NAME",
        help="which losses; default those of the committed results, of: " + "; ".join(METHODS),
    )
    parser.add_argument(
        "--setting",
        nargs=3,
        type=float,
        metavar=("NOISE", "TEMPERATURE", "BATCH"),
        help="only this cell of the sweep",
    )
    parser.add_argument("--runs", type=int, default=10, help="initialisations of every cell (default 10)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results, JSON (default %(default)s)")
    parser.add_argument("--figure", type=Path, help="draw the results here")
    options = parser.parse_args()
    methods = options.methods
    cells = [*headline(methods)] if options.headline else [*more_samples(methods), *sweep(methods)]
    if options.setting:
        cells = [c for c in sweep(methods) if [c.noise, c.temperature, c.batch] == options.setting]
        if not cells:
            parser.error(f"--setting {options.setting} is no cell of the sweep: see examples/synthetic/cells.py")
    rows = []
    for cell in track(cells, "training"):
        problem = Problem(options.runs, cell.samples, cell.noise)
        rows.append(measure(cell, problem))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"torch": torch.__version__, "runs": options.runs, "cells": rows}) + "\n")
    report(rows)
    if options.figure:
        from examples.synthetic.figure import draw

        draw(rows, options.figure)


def report(rows: list[dict]) -> None:
    table = Table(title="median over the runs; recovery with its range")
    for name in ("samples", "noise", "tau", "batch", "method", "recovery", "loss", "best loss", "recall", "held out"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        recovery = row["recovery"]
        table.add_row(
            *(f"{row[name]:g}" for name in ("samples", "noise", "temperature", "batch")),
            row["method"],
            f"{median(recovery):.3f} ({min(recovery):.3f} to {max(recovery):.3f})",
            *(f"{median(row[name]):.3f}" for name in ("loss", "best_loss", "recall", "held_out_recall")),
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
