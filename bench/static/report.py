"""Compiles configurations, prints their faults and bounds, and compares these with the committed table."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from contrastile.bench.static.checks import faults_of
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
    rows, faults = examine(_configurations(which, targets))
    print_rows(rows)
    print("\ncycles of a multiprocessor for one tile, by pipe: a bound, no prediction (docs/kernels.md)")
    for line in faults:
        print(f"fault: {line}")
    kept = [row for row in rows if is_kept(row)]
    if write:
        others = [row for row in read_rows() if row["target"] not in targets] if COMMITTED.exists() else []
        COMMITTED.write_text(text_of([*others, *kept]))
        return bool(faults)
    fallen = regressions(read_rows(), kept)
    for line in fallen:
        print(f"fell: {line}")
    if not faults and not fallen:
        print("no faults; no bound fell")
    return bool(faults or fallen)


def examine(configurations: Iterable[Configuration]) -> tuple[list[Row], list[str]]:
    """Rows of the kernels with a bound and faults of all, in words; that a kernel does not compile is a fault too."""
    rows, faults = [], []
    for configuration in configurations:
        try:
            faults += [f"{configuration}: {fault}" for fault in faults_of(configuration)]
            if configuration.is_bounded:
                rows.append(row_of(configuration))
        except RuntimeError as error:
            faults.append(str(error))
    return rows, faults


def _configurations(which: str, targets: tuple[str, ...]) -> Iterable[Configuration]:
    if which == "few":
        return (c for c in covering_configurations() if c.target in targets)
    if which == "table":
        return bounded_configurations(targets)
    if which == "all":
        # Those of the table come twice, compiled once.
        return dict.fromkeys(itertools.chain(bounded_configurations(targets), all_configurations(targets)))
    raise ValueError(f"which is {which!r}: expected few, table or all")
