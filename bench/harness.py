"""Runs jobs in fresh processes and turns what comes back into rows.

On a processor each job has a process of its own, so that memory is the job's. A device's memory is counted by its
allocator: there all sizes of one implementation share a process, which loads the device's libraries once.

A job that would not fit in the memory at hand is refused before it starts: a machine that swaps measures its disk. A
device does not swap, and refuses by itself.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from contrastile.bench.cases import PRODUCT_BUFFER_BYTES, Case
from contrastile.bench.implementations import IMPLEMENTATIONS
from contrastile.bench.machine import GIB, MIB, available_bytes

PROCESS_BYTES = GIB // 2  # interpreter, torch and a bounded workspace
USABLE_SHARE = 0.9  # of the memory available


@dataclass(frozen=True)
class Row:
    """What is known of a case. Figures are None unless status is "measured" and they were asked for."""

    case: Case
    status: str  # measured | refused | skipped | failed | dry run
    reason: str | None = None
    seconds: float | None = None  # forward + backward, median of the repetitions
    seconds_min: float | None = None
    seconds_max: float | None = None
    product_seconds: float | None = None  # one N x M x D product, median: child.one_product
    in_products: float | None = None  # seconds / product_seconds of the same repetition, median
    fma_peak: float | None = None  # flop/s, median
    fma_fraction: float | None = None  # flop of the products / (seconds * peak around them), median
    no_peak: str | None = None  # why there is no FMA peak
    extra_bytes: int | None = None  # peak beyond inputs, output and gradients
    memory_note: str | None = None
    loss_error: float | None = None  # relative, against float64
    gradient_error: float | None = None  # largest, relative to the largest entry
    error_rows: int | None = None
    # (seconds, product seconds, peak) of each repetition
    repetitions: list[tuple[float, float, float | None]] | None = None

    @property
    def extra_mib(self) -> float | None:
        return None if self.extra_bytes is None else self.extra_bytes / MIB

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self.case), **{key: value for key, value in asdict(self).items() if key != "case"}}


def needed_bytes(cases: Sequence[Case], *, timed: bool = True) -> int:
    """Estimate for the child: every case's inputs and gradients, the hungriest one's scores, the product's buffer."""
    embeddings = sum(2 * case.embedding_bytes for case in cases)
    scores = max(IMPLEMENTATIONS[case.implementation].score_bytes(case) for case in cases)
    buffer = min(PRODUCT_BUFFER_BYTES, 4 * cases[0].rows * cases[0].cols) if timed else 0
    return embeddings + scores + buffer + PROCESS_BYTES


def refusal(cases: Sequence[Case], *, timed: bool = True) -> str | None:
    available = None if cases[0].device == "cuda" else available_bytes()
    needed = needed_bytes(cases, timed=timed)
    if available is None or needed <= USABLE_SHARE * available:
        return None
    return f"needs {needed / GIB:.1f} GiB, {available / GIB:.1f} GiB available"


def missing(case: Case) -> str | None:
    """Why this case cannot run here, if that is known beforehand."""
    implementation = IMPLEMENTATIONS[case.implementation]
    if case.loss not in implementation.losses:
        return f"{case.implementation} has no {case.loss}"
    if case.device not in implementation.devices:
        return f"{case.implementation} runs on {' or '.join(implementation.devices)}, not on {case.device}"
    if case.device == "cuda" and not torch.cuda.is_available():
        return "no CUDA or ROCm device"
    if case.device == "interpreter" and os.environ.get("TRITON_INTERPRET") != "1":
        return "TRITON_INTERPRET=1 is not set"
    if case.backend is not None:
        from contrastile import backends

        if case.implementation != "contrastile":
            return f"{case.implementation} has no backends"
        if case.backend not in backends.available():
            return f"no backend named {case.backend!r}"
        return backends.available()[case.backend]
    return implementation.missing()


@dataclass(frozen=True)
class Job:
    """Cases of equal size, dtype, threads and device that are measured together.

    Memory is only meaningful for a case alone: with several, pass memory=False.
    """

    cases: Sequence[Case]
    repeats: int = 5
    memory: bool = True
    error: bool = False

    def __post_init__(self) -> None:
        sizes = {(case.rows, case.cols, case.dim, case.dtype, case.threads, case.device) for case in self.cases}
        if len(sizes) != 1:
            raise ValueError(f"cases of one job must agree in size, dtype, threads and device, got {sorted(sizes)}")


def run_job(
    cases: Sequence[Case],
    *,
    repeats: int = 5,
    memory: bool = True,
    error: bool = False,
    limit_seconds: float | None = None,
) -> list[Row]:
    """Measure one Job in one fresh process; cases that cannot run get a reason."""
    return run_jobs([Job(cases, repeats, memory, error)], limit_seconds=limit_seconds)


def run_jobs(jobs: Sequence[Job], *, limit_seconds: float | None = None) -> list[Row]:
    """One after another in one fresh process, all within the limit; the rows of all cases."""
    known: dict[Case, dict[str, Any]] = {}
    able: list[Job] = []
    for job in jobs:
        reasons = {case: missing(case) for case in job.cases}
        known |= {case: {"status": "skipped", "reason": reason} for case, reason in reasons.items() if reason}
        cases = [case for case in job.cases if reasons[case] is None]
        refused = refusal(cases, timed=job.repeats > 0) if cases else None
        if refused:
            known |= {case: {"status": "refused", "reason": refused} for case in cases}
        elif cases:
            able.append(replace(job, cases=cases))
    if able:
        known |= _in_child(able, limit_seconds)
    return [Row(case=case, **known[case]) for job in jobs for case in job.cases]


def run_cases(
    cases: Iterable[Case],
    *,
    repeats: int = 5,
    limit_seconds: float | None = None,
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Each case for itself, the float64 error once per implementation (at 512 rows, whatever the size).

    `limit_seconds` is for one case.
    """
    cases = list(cases)
    found: dict[Case, Row] = {}
    known_error: dict[tuple[object, ...], Row] = {}
    for group in _processes(cases):
        asked: set[tuple[object, ...]] = set(known_error)
        jobs = []
        for case in group:
            jobs.append(Job([case], repeats, error=_error_key(case) not in asked))
            asked.add(_error_key(case))
        limit = None if limit_seconds is None else limit_seconds * len(jobs)
        for row in run_jobs(jobs, limit_seconds=limit):
            if row.status == "measured":
                row = _with_error_of(row, known_error.setdefault(_error_key(row.case), row))
            found[row.case] = row
            if on_row:
                on_row(row)
    return [found[case] for case in cases]


def _processes(cases: Sequence[Case]) -> Iterator[list[Case]]:
    """The cases that share a process."""
    together: dict[object, list[Case]] = {}
    for number, case in enumerate(cases):
        key = (case.implementation, case.backend) if case.device == "cuda" else number
        together.setdefault(key, []).append(case)
    yield from together.values()


def _error_key(case: Case) -> tuple[object, ...]:
    return case.loss, case.implementation, case.backend, case.dim, case.dtype, case.device


def _with_error_of(row: Row, source: Row) -> Row:
    return replace(
        row, loss_error=source.loss_error, gradient_error=source.gradient_error, error_rows=source.error_rows
    )


def _in_child(jobs: Sequence[Job], limit_seconds: float | None) -> dict[Case, dict[str, Any]]:
    threads = str(jobs[0].cases[0].threads)
    paths = os.pathsep.join(path for path in sys.path if path)  # the child finds what this process finds
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    with tempfile.TemporaryDirectory() as folder:
        results, words = Path(folder) / "results.json", Path(folder) / "stderr"
        reason = None
        try:
            # Into a file: a compiler's workers that outlive the child would keep a pipe open.
            with words.open("w") as stderr:
                status = subprocess.run(
                    [sys.executable, "-m", "contrastile.bench.child", str(results)],
                    input=json.dumps([asdict(job) for job in jobs]),
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    text=True,
                    timeout=limit_seconds,
                    env=environment,
                ).returncode
        except subprocess.TimeoutExpired:
            reason = f"not done after {limit_seconds:g} s"
        else:
            if status != 0:
                reason = _why_ended(status, words.read_text())
        done: list[list[dict[str, Any]]] = json.loads(results.read_text()) if results.exists() else []
    figures = [found for job in done for found in job]
    cases = [case for job in jobs for case in job.cases]
    figures += [{"status": "failed", "reason": reason}] * (len(cases) - len(figures))
    return dict(zip(cases, figures, strict=True))


def _why_ended(status: int, words: str) -> str:
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return (words.strip() or f"exit status {status}, no message").splitlines()[-1]
