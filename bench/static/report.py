"""Compiles configurations, prints their faults and bounds, and compares these with the committed table."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from contrastile.bench.static.checks import faults_of
from contrastile.bench.static.cuda import CUDA_TARGETS, read, rows_of
from contrastile.bench.static.cuda import faults_of as faults_of_cuda
from contrastile.bench.static.matrix import (
    TARGETS,
    Configuration,
    all_configurations,
    bounded_configurations,
    covering_configurations,
)
from contrastile.bench.static.table import COMMITTED, Row, is_kept, print_rows, read_rows, regressions, row_of, text_of


def report(which: str, targets: tuple[str, ...] = TARGETS, write: bool = False) -> int:
    """`which`: "few", "table" or "all". Returns 1 where a kernel has a fault or, unless writing, a bound fell."""
    configurations = list(_configurations(which, targets))
    rows, faults = examine(configurations)
    print_rows(rows)
    print("\ncycles of a multiprocessor for one tile, by pipe: a bound, no prediction (docs/kernels.md)")
    for line in faults:
        print(f"fault: {line}")
    spilling = sum(": spills " in line for line in faults)
    print(f"{len(configurations)} configurations: {spilling} spill registers, {len(faults)} faults")
    kept = [row for row in rows if is_kept(row)]
    return _compare_or_write(kept, faults, "triton", targets, write)


def report_cuda(module: Path, targets: tuple[str, ...] = CUDA_TARGETS, write: bool = False) -> int:
    """The same of the CUDA kernels in a built module."""
    rows = rows_of(module, targets)
    kernels = [kernel for kernel in read(module) if kernel.compiled.target in targets]
    faults = [f"{kernel}: {fault}" for kernel in kernels for fault in faults_of_cuda(kernel)]
    print_rows(rows)
    for line in faults:
        print(f"fault: {line}")
    print(f"{len(kernels)} kernels: {len(faults)} faults")
    return _compare_or_write(rows, faults, "cuda", targets, write)


def _compare_or_write(rows: list[Row], faults: list[str], source: str, targets: tuple[str, ...], write: bool) -> int:
    if write:
        committed = read_rows() if COMMITTED.exists() else []
        others = [row for row in committed if row["target"] not in targets or row["source"] != source]
        COMMITTED.write_text(text_of([*others, *rows]))
        return bool(faults)
    fallen = regressions(read_rows(), rows)
    for line in fallen:
        print(f"fell: {line}")
    if not faults and not fallen:
        print("no faults; no bound fell")
    return bool(faults or fallen)


def examine(configurations: Sequence[Configuration]) -> tuple[list[Row], list[str]]:
    """Rows of the kernels with a bound and faults of all, in words; that a kernel does not compile is a fault too."""
    rows: list[Row] = []
    faults: list[str] = []
    begin, before = time.monotonic(), ""
    for done, configuration in enumerate(configurations):
        if configuration.target != before:
            before = configuration.target
            print(f"{time.monotonic() - begin:5.0f} s, {done} of {len(configurations)}: {before}", file=sys.stderr)
        try:
            found = faults_of(configuration)
            if configuration.is_bounded:
                rows.append(row_of(configuration))
        except RuntimeError as error:
            found = [str(error).removeprefix(f"{configuration}: ")]
        for fault in found:  # at once too: all of them take minutes
            faults.append(f"{configuration}: {fault}")
            print(faults[-1], file=sys.stderr)
    return rows, faults


def _configurations(which: str, targets: tuple[str, ...]) -> Iterable[Configuration]:
    if which == "few":
        return (c for c in covering_configurations() if c.target in targets)
    if which == "table":
        return bounded_configurations(targets)
    if which == "all":
        # Those of the table come twice, compiled once; target by target.
        both = itertools.chain(bounded_configurations(targets), all_configurations(targets))
        return sorted(dict.fromkeys(both), key=lambda c: targets.index(c.target))
    raise ValueError(f"which is {which!r}: expected few, table or all")
