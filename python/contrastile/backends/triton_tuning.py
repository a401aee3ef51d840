"""Plans that were measured on the device at hand, beside those of the table.

With CONTRASTILE_AUTOTUNE=1, the first sweep over a shape times the table's plan and its neighbours on the problem it
was called with, and keeps the fastest, in memory and in a file that later processes read. Shapes are told apart by
powers of two of N and M, so that a batch whose size changes at every step is measured once.

Measuring waits for the device and compiles each candidate. It is therefore asked for, and never happens while a CUDA
graph is captured: a sweep then runs by what is known.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from contrastile.backends.float32 import tf32_is_allowed
from contrastile.kernels.plans import TilePlan, neighbours
from contrastile.pairs import PairProblem

REPETITIONS = 5  # of each candidate, after one that compiles it

Run = Callable[[TilePlan], object]


def tuned(sweep: str, problem: PairProblem, plan: TilePlan, run: Run) -> TilePlan:
    """The fastest plan known for this sweep and shape, or the table's. `run` does the sweep by a plan."""
    if not _asked_for():
        return plan
    known, key = _known_plans(problem.anchors.device), _key(sweep, problem, plan)
    if key not in known and not _is_capturing(problem.anchors.device):
        with torch.cuda.device_of(problem.anchors):
            seconds = {candidate: _seconds(run, candidate) for candidate in (plan, *neighbours(plan))}
        known[key] = min(seconds, key=lambda candidate: seconds[candidate])
        _write(_file_of(problem.anchors.device), known)
    return known.get(key, plan)


def _asked_for() -> bool:
    return os.environ.get("CONTRASTILE_AUTOTUNE", "0") not in ("", "0")


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _key(sweep: str, problem: PairProblem, plan: TilePlan) -> str:
    dtype = str(problem.anchors.dtype).removeprefix("torch.")
    products = os.environ.get("CONTRASTILE_FLOAT32") or ("tf32" if tf32_is_allowed() else "")
    precision = f" {products}" if dtype == "float32" and products else ""
    loads = "descriptors" if plan.descriptors else "pointers"
    rows, cols = (triton.next_power_of_2(size) for size in (problem.rows, problem.cols))
    return f"{sweep} {dtype}{precision} D={problem.anchors.shape[1]} N<={rows} M<={cols} {loads}"


def _seconds(run: Run, plan: TilePlan) -> float:
    """Median time of a sweep; infinite for a plan that the device has no room for."""
    try:
        run(plan)
    except (OutOfResources, PTXASError, CompilationError):
        return float("inf")
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPETITIONS + 1)]
    events[0].record()
    for event in events[1:]:
        run(plan)
        event.record()
    torch.cuda.synchronize()
    return float(median(first.elapsed_time(second) for first, second in pairwise(events))) / 1e3


@cache
def _known_plans(device: torch.device) -> dict[str, TilePlan]:
    """By key: those of the file, to which this process adds what it measures."""
    return _read(_file_of(device))


def _read(file: Path) -> dict[str, TilePlan]:
    try:
        return {key: TilePlan(**fields) for key, fields in json.loads(file.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"measured plans are not read from {file} and will be measured anew: {error}", stacklevel=2)
        return {}


def _file_of(device: torch.device) -> Path:
    """One for each kind of device and version of the compiler."""
    home = os.environ.get("CONTRASTILE_CACHE_DIR") or Path.home() / ".cache" / "contrastile"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    name = re.sub(r"[^A-Za-z0-9]+", "-", name)
    return Path(home) / f"plans-{name}-triton-{triton.__version__}.json"


def _write(file: Path, known: dict[str, TilePlan]) -> None:
    """Adds to what other processes have written, and replaces the file at once: they may be reading it."""
    try:
        known = _read(file) | known
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".json", delete=False) as new:
            json.dump({key: asdict(plan) for key, plan in sorted(known.items())}, new, indent=1)
        os.replace(new.name, file)
    except OSError as error:
        warnings.warn(f"measured plans are not kept in {file}: {error}", stacklevel=2)
