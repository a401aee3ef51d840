"""Which runs are made, and where the models of each first seed are kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from examples.common import runs
from examples.common.runs import Results
from examples.fusion.train import Run, Settings, perform


def complete(wanted: Sequence[Run], results: Results, settings: Settings, work: Path, processes: int = 1) -> None:
    """Makes the runs that `results` lacks. The models of each first seed are kept in `work`."""
    jobs = [(run, settings, model_path(work, run) if run.seed == 0 else None) for run in wanted]
    runs.complete(perform, jobs, results, processes)


def model_path(work: Path, run: Run) -> Path:
    return work / f"{run.structure}.pt"
