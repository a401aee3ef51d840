"""Time and memory of a loss against N within a time limit: the table with which the demo ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from contrastile.bench.cases import Case
from contrastile.bench.harness import Row, run_job


@dataclass(frozen=True)
class ScalingRow:
    implementation: str
    n: int
    seconds: float | None = None
    mib: float | None = None  # peak beyond inputs, output and gradients
    refused: str | None = None  # why there are no figures


def loss_scaling(
    sizes: Sequence[int],
    *,
    implementations: Sequence[str] = ("dense", "contrastile"),
    loss: str = "symmetric",
    dim: int = 512,
    threads: int = 2,
    repeats: int = 3,
    limit_seconds: float = 60.0,
    on_row: Callable[[ScalingRow], None] | None = None,
) -> list[ScalingRow]:
    """Forward + backward of a loss over N, each size in a fresh process.

    A size is refused, with the reason in its row, where memory would not do or where, from the time of the size
    before, it would take more than limit_seconds.

    Args:
        sizes: N, in growing order. implementations: names of contrastile.bench.IMPLEMENTATIONS.
        loss: one of contrastile.bench.LOSSES. limit_seconds: for one row, all its repetitions together.
        on_row: called with each row as soon as it is known.
    """
    rows: list[ScalingRow] = []
    for implementation in implementations:
        known: Row | None = None
        for n in sizes:
            case = Case(loss, implementation, n, n, dim, threads=threads)
            expected = _expected_seconds(known, n, repeats)
            if expected > limit_seconds:
                row = ScalingRow(implementation, n, refused=f"would take {expected:.0f} s, limit {limit_seconds:.0f} s")
            else:
                measured = run_job([case], repeats=repeats, limit_seconds=2 * limit_seconds)[0]
                row = ScalingRow(implementation, n, measured.seconds, measured.extra_mib, measured.reason)
                known = measured if measured.seconds else known
            rows.append(row)
            if on_row:
                on_row(row)
    return rows


def _expected_seconds(known: Row | None, n: int, repeats: int) -> float:
    if known is None or known.seconds is None:
        return 0.0
    runs = repeats + 2  # and one for memory, one that sets the pace
    return runs * known.seconds * (n / known.case.rows) ** 2
