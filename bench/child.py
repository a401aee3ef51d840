"""The process in which jobs are measured: the jobs as JSON on stdin, their results as JSON in the named file.

    python -m contrastile.bench.child RESULTS.json < JOBS.json

A job is one case, or several of equal size whose repetitions alternate (A B A B ...), so that a neighbour who
takes the machine for a second takes it from all of them. On a CPU, samples of the FMA peak frame every time; each
repetition times one N x M x D product as well. A device is waited for where a time begins and ends.

The file is written after each job: what a later one breaks off leaves the earlier results.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from contrastile.bench.cases import DTYPES, ERROR_ROWS, PRODUCT_BUFFER_BYTES, Case, Inputs, make_inputs, true_loss
from contrastile.bench.implementations import IMPLEMENTATIONS, Loss
from contrastile.bench.machine import DevicePeakMemory, PeakMemory
from torch import Tensor

WARM_ROWS = 64  # loads code and starts threads, and leaves no workspace of note behind
SHORTEST_SECONDS = 0.05  # a shorter call is timed several times over
SETTLE_SECONDS = 0.005  # idle threads of the previous call spin for a while before they sleep

Figures = dict[str, Any]


def main() -> int:
    results: list[list[Figures]] = []
    for job in json.load(sys.stdin):
        results.append(figures_of(job))
        _replace(Path(sys.argv[1]), json.dumps(results))
        if torch.cuda.is_initialized():
            torch.compiler.reset()  # what was compiled for the shapes of this job
            gc.collect()
            torch.cuda.empty_cache()
    return 0


def _replace(file: Path, text: str) -> None:
    """At once: a process that is ended while it writes leaves the file as it was."""
    new = file.with_suffix(".new")
    new.write_text(text)
    new.replace(file)


def figures_of(job: dict[str, Any]) -> list[Figures]:
    cases = [Case(**case) for case in job["cases"]]
    torch.set_num_threads(cases[0].threads)
    try:
        return measure(cases, repeats=job["repeats"], memory=job["memory"], error=job["error"])
    except ImportError as missing:
        return [{"status": "skipped", "reason": str(missing)} for _ in cases]
    except torch.OutOfMemoryError as full:
        reason = ". ".join(str(full).split(". ")[:2])  # what is full, and what was asked of it
        return [{"status": "refused", "reason": reason} for _ in cases]


def measure(cases: list[Case], *, repeats: int, memory: bool, error: bool) -> list[Figures]:
    """Figures of each case; without repeats no time is taken."""
    losses = [IMPLEMENTATIONS[case.implementation].build(case) for case in cases]
    figures: list[Figures] = [{"status": "measured"} for _ in cases]
    calls: list[Callable[[], Tensor]] = []
    for case, loss, found in zip(cases, losses, figures, strict=True):
        inputs = make_inputs(case)
        warm_up(case, loss, inputs)
        if memory:
            found.update(extra_memory(case, loss, inputs))
        calls.append(partial(forward_backward, loss, inputs))
    if repeats:
        for found, timed in zip(figures, interleaved_times(cases, calls, repeats), strict=True):
            found.update(timed)
    if error:
        for case, loss, found in zip(cases, losses, figures, strict=True):
            found.update(error_against_truth(case, loss))
    return list(map(of_dry_run, figures)) if cases[0].device == "interpreter" else figures


def of_dry_run(found: Figures) -> Figures:
    """Errors alone: the interpreter's times and memory say nothing about a device."""
    kept = {name: value for name, value in found.items() if name.endswith(("_error", "_rows"))}
    return kept | {"status": "dry run", "reason": "interpreted"}


def forward_backward(loss: Loss, inputs: Inputs) -> Tensor:
    for leaf in inputs.leaves:
        leaf.grad = None
    value = loss(inputs)
    torch.autograd.backward(value)
    return value.detach()


def warm_up(case: Case, loss: Loss, inputs: Inputs) -> None:
    # On a device everything is compiled at the first call, for some sizes anew, and the workspace is not the host's.
    if not IMPLEMENTATIONS[case.implementation].compiles and case.device != "cuda":
        inputs = make_inputs(replace(case, rows=min(case.rows, WARM_ROWS), cols=min(case.cols, WARM_ROWS)))
    forward_backward(loss, inputs)


def extra_memory(case: Case, loss: Loss, inputs: Inputs) -> Figures:
    """Peak beyond inputs, output and gradients."""
    for leaf in inputs.leaves:
        leaf.grad = None
    peak = DevicePeakMemory() if case.device == "cuda" else PeakMemory()
    forward_backward(loss, inputs)
    gradients = sum(leaf.nbytes for leaf in inputs.leaves)
    return {"extra_bytes": max(0, peak.growth() - gradients), "memory_note": peak.note}


def interleaved_times(cases: list[Case], calls: list[Callable[[], Tensor]], repeats: int) -> list[Figures]:
    product, device = one_product(cases[0]), cases[0].device
    probe, no_peak = fma_probe(cases[0])
    timed_calls: list[Callable[[], object]] = [*calls, product]
    first = [seconds_of(call, 1, device) for call in timed_calls]
    loops = [max(1, math.ceil(SHORTEST_SECONDS / seconds)) for seconds in first]
    probe_seconds = min(1.0, max(SHORTEST_SECONDS, 0.1 * max(first)))

    samples: list[list[tuple[float, float, float | None]]] = [[] for _ in cases]
    for _ in range(repeats):
        times: list[float] = []
        peaks = [probe(probe_seconds)]
        for call, count in zip(timed_calls, loops, strict=True):
            time.sleep(SETTLE_SECONDS)
            times.append(seconds_of(call, count, device))
            peaks.append(probe(probe_seconds))
        for index, kept in enumerate(samples):
            before, after = peaks[index], peaks[index + 1]
            peak = None if before is None or after is None else (before + after) / 2
            kept.append((times[index], times[-1], peak))
    return [{**summary(case, kept), "no_peak": no_peak} for case, kept in zip(cases, samples, strict=True)]


def summary(case: Case, samples: list[tuple[float, float, float | None]]) -> Figures:
    """Medians over repetitions of (seconds, seconds of one product, FMA peak in flop/s).

    Ratios are formed within a repetition before the median is taken.
    """
    seconds = [each for each, _, _ in samples]
    peaks = [(each, peak) for each, _, peak in samples if peak]
    has_peak = len(peaks) == len(samples) and case.dtype == "float32"
    return {
        "seconds": median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "product_seconds": median(product for _, product, _ in samples),
        "in_products": median(each / product for each, product, _ in samples),
        "fma_peak": median(peak for _, peak in peaks) if has_peak else None,
        "fma_fraction": median(case.flop / (each * peak) for each, peak in peaks) if has_peak else None,
        "repetitions": samples,
    }


def seconds_of(call: Callable[[], object], count: int, device: str = "cpu") -> float:
    """Mean over calls that a device may take up one behind the other, from an idle device to an idle device."""
    wait = torch.cuda.synchronize if device == "cuda" else _no_wait
    wait()
    begin = time.perf_counter()
    for _ in range(count):
        call()
    wait()
    return (time.perf_counter() - begin) / count


def _no_wait() -> None:
    pass


def one_product(case: Case) -> Callable[[], None]:
    """x @ y.T into a buffer made beforehand; in strips where that would pass PRODUCT_BUFFER_BYTES.

    In float32 on a CPU, where 16 bits may have no units, else in the case's dtype.
    """
    dtype = DTYPES[case.dtype] if case.device == "cuda" else torch.float32
    options: dict[str, Any] = {"dtype": dtype, "device": case.tensor_device}
    x, y = torch.randn(case.rows, case.dim, **options), torch.randn(case.cols, case.dim, **options)
    strip = min(case.rows, max(1, PRODUCT_BUFFER_BYTES // (dtype.itemsize * case.cols)))
    out = torch.zeros(strip, case.cols, **options)

    def run() -> None:
        for part in torch.split(x, strip):
            torch.mm(part, y.T, out=out[: part.shape[0]])

    return run


def fma_probe(case: Case) -> tuple[Callable[[float], float | None], str | None]:
    """A function that samples the float32 FMA peak (flop/s) for some seconds, or why there is none."""
    if case.device != "cpu":
        return lambda seconds: None, "no FMA probe: it is the processor's"
    try:
        measure_peak = importlib.import_module("contrastile._C").fma_peak
    except (ImportError, AttributeError) as missing:
        return lambda seconds: None, f"no FMA probe: {missing}"
    return lambda seconds: float(measure_peak(case.threads, seconds)), None


def error_against_truth(case: Case, loss: Loss) -> Figures:
    """Relative error of the loss, and of the gradients by their largest entry, at ERROR_ROWS rows; truth on the CPU."""
    inputs = make_inputs(replace(case, rows=ERROR_ROWS, cols=ERROR_ROWS), seed=1)
    value = forward_backward(loss, inputs)
    doubles = [leaf.detach().cpu().double().requires_grad_() for leaf in inputs.leaves]
    normalizes = IMPLEMENTATIONS[case.implementation].normalizes
    rows = [F.normalize(leaf) if normalizes else leaf for leaf in doubles]
    constants = (vector.cpu().double() for vector in (inputs.log_u, inputs.log_v))
    exact = Inputs(rows[0], rows[1] if len(rows) > 1 else None, *constants)
    truth = true_loss(case.loss, exact)
    torch.autograd.backward(truth)
    return {
        "error_rows": ERROR_ROWS,
        "loss_error": abs(value.item() - truth.item()) / abs(truth.item()),
        "gradient_error": max(map(largest_relative_error, inputs.leaves, doubles)),
    }


def largest_relative_error(leaf: Tensor, exact: Tensor) -> float:
    if leaf.grad is None or exact.grad is None:
        return math.inf
    return float((leaf.grad.cpu().double() - exact.grad).abs().max() / exact.grad.abs().max())


if __name__ == "__main__":
    raise SystemExit(main())
