"""Where the time of a training step goes on a device: its kernels, and whether the host keeps up.

    python -m contrastile.bench.steps STEPS.json [--backends triton,cuda] [--sizes 4096,16384] [--dims 128,512]

A row is one loss, forward and backward: device_seconds between events around the step, host_seconds until the host has
started all of it (where both are equal the device waits for the host), and the seconds and launches of each kernel, as
PyTorch's profiler sees them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from contrastile.bench.cases import DTYPES, LOSSES, PRODUCTS, Case, make_inputs
from contrastile.bench.child import forward_backward
from contrastile.bench.implementations import IMPLEMENTATIONS
from torch.profiler import DeviceType, ProfilerActivity, profile

REPEATS = 5
NAME_LENGTH = 80  # of a kernel, whose template arguments go on for lines


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("steps are measured on a CUDA or ROCm device, and there is none")
    rows = []
    grid = itertools.product(options.backends, options.dims, options.sizes, LOSSES)
    for backend, dim, size, loss in grid:
        case = Case(loss, "contrastile", size, size, dim, options.dtype, backend=backend, device="cuda")
        rows.append(measure(case))
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
        print(line(rows[-1]), flush=True)
    return 0


def measure(case: Case) -> dict[str, Any]:
    inputs = make_inputs(case)
    step = partial(forward_backward, IMPLEMENTATIONS[case.implementation].build(case), inputs)
    for _ in range(2):  # compiles, and knows what it compiled
        step()
    device, host = zip(*(_times(step) for _ in range(REPEATS)), strict=True)
    return {
        **{name: getattr(case, name) for name in ("loss", "backend", "rows", "dim", "dtype")},
        "device_seconds": median(device),
        "host_seconds": median(host),
        "kernels": kernels(step),
    }


def _times(step: Callable[[], object]) -> tuple[float, float]:
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin = time.perf_counter()
    before.record()
    step()
    after.record()
    host = time.perf_counter() - begin
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1e3, host


def kernels(step: Callable[[], object]) -> list[dict[str, Any]]:
    """Of one step, those that take longest first."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    found: dict[str, dict[str, Any]] = {}
    for event in seen.events() or ():
        if event.device_type == DeviceType.CUDA:
            name = event.name[:NAME_LENGTH]
            entry = found.setdefault(name, {"name": name, "seconds": 0.0, "launches": 0})
            entry["seconds"] += event.device_time_total / 1e6
            entry["launches"] += 1
    return sorted(found.values(), key=lambda entry: -entry["seconds"])


def line(row: dict[str, Any]) -> str:
    flop = 2 * PRODUCTS[row["loss"]] * row["rows"] ** 2 * row["dim"]
    busy = sum(entry["seconds"] for entry in row["kernels"])
    what = f"{row['backend']} {row['dtype']} N={row['rows']} D={row['dim']} {row['loss']}"
    device, host = row["device_seconds"], row["host_seconds"]
    rate = flop / device / 1e12
    return f"{what}: device {device:.3g} s ({rate:.0f} Tflop/s), busy {busy:.3g} s, host {host:.3g} s"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m contrastile.bench.steps", description=__doc__.splitlines()[0])
    names, numbers = (lambda text: text.split(",")), (lambda text: list(map(int, text.split(","))))
    parser.add_argument("out", type=Path)
    parser.add_argument("--backends", type=names, default=["triton"])
    parser.add_argument("--sizes", type=numbers, default=[4096, 16384])
    parser.add_argument("--dims", type=numbers, default=[128, 512])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
