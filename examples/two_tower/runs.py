"""Which runs are made, and where the towers of each first seed are kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from examples.common import runs
from examples.common.runs import Results
from examples.two_tower.train import Run, Settings, perform


def complete(wanted: Sequence[Run], results: Results, settings: Settings, work: Path, processes: int = 1) -> None:
    """Makes the runs that `results` lacks. Pictures of emoji and the towers of each first seed are kept in `work`."""
    jobs = [(run, settings, work, model_path(work, run) if run.seed == 0 else None) for run in wanted]
    runs.complete(perform, jobs, results, processes)


def model_path(work: Path, run: Run) -> Path:
    return work / f"{run.contrast}-{run.structure}-{run.batch}.pt"
