"""The package's performance promises, measured and judged: float32, forward + backward, random unit rows, scale 20.

Speeds are compared inside one process in which the contenders take turns; memory is that of a case alone in its
process. "dense" and "compiled" without a loss mean the symmetric one, as CLIP is trained.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from contrastile.bench.cases import Case
from contrastile.bench.harness import Row, run_job

OURS = ("gamma", "one_direction", "symmetric")
ALL_LOSSES = (*OURS, "nt_xent")

FASTER_THAN_DENSE = {"gamma": 2.5, "one_direction": 2.5, "symmetric": 1.9}
FASTER_THAN_COMPILED = {"gamma": 1.3, "one_direction": 1.3, "symmetric": 1.0}
PEAK_SHARE = 0.80
EXTRA_MIB = 96.0
GROWTH_SPREAD = 0.15
NT_XENT_SHARE = 0.6
FASTER_THAN_DENSE_WHEN_SMALL = 1.0


@dataclass(frozen=True)
class Scope:
    """Sizes at which promises are measured; smaller ones serve the tests."""

    main: int = 8192
    second: int = 2048
    small: int = 256
    memory: tuple[int, ...] = (2048, 8192, 65536)
    growth: tuple[int, ...] = (4096, 8192, 16384, 32768)
    dim: int = 512
    threads: int = 2
    repeats: int = 5


@dataclass(frozen=True)
class Promise:
    name: str
    figure: float | None  # None: could not be measured, see reason
    bound: float
    unit: str
    at_least: bool  # else at most
    reason: str | None = None

    @property
    def holds(self) -> bool:
        if self.figure is None:
            return False
        return self.figure >= self.bound if self.at_least else self.figure <= self.bound

    @property
    def verdict(self) -> str:
        if self.figure is None:
            return f"not measured: {self.reason}"
        return "holds" if self.holds else "does not hold"

    @property
    def figure_text(self) -> str:
        return "-" if self.figure is None else _with_unit(self.figure, self.unit)

    @property
    def bound_text(self) -> str:
        return f"{'>=' if self.at_least else '<='} {_with_unit(self.bound, self.unit)}"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}


@dataclass
class Findings:
    promises: list[Promise] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)


def measure_promises(scope: Scope | None = None, on_promise: Callable[[Promise], None] | None = None) -> Findings:
    """Runs every promise's measurement, the short ones first."""
    scope = scope or Scope()
    findings = Findings()
    for part in (_small, _second, _main, _nt_xent, _memory, _growth):
        for found in part(scope, findings.rows):
            findings.promises.append(found)
            if on_promise:
                on_promise(found)
    return findings


def _case(scope: Scope, loss: str, implementation: str, n: int) -> Case:
    return Case(loss, implementation, n, n, scope.dim, threads=scope.threads)


def _duel(scope: Scope, n: int, contenders: Sequence[tuple[str, str]], kept: list[Row]) -> dict[tuple[str, str], Row]:
    """Rows by (loss, implementation), measured in turns in one process."""
    cases = [_case(scope, loss, implementation, n) for loss, implementation in contenders]
    rows = run_job(cases, repeats=scope.repeats, memory=False)
    kept.extend(rows)
    return dict(zip(contenders, rows, strict=True))


def _main(scope: Scope, kept: list[Row]) -> list[Promise]:
    ours = [(loss, "contrastile") for loss in OURS]
    rows = _duel(scope, scope.main, [*ours, ("symmetric", "dense"), ("symmetric", "compiled")], kept)
    found = []
    for loss in OURS:
        own, n = rows[loss, "contrastile"], scope.main
        found.append(_speed(f"{loss} against dense, N = {n}", own, rows["symmetric", "dense"], FASTER_THAN_DENSE[loss]))
        found.append(
            _speed(f"{loss} against compiled, N = {n}", own, rows["symmetric", "compiled"], FASTER_THAN_COMPILED[loss])
        )
        reason = own.reason or own.no_peak
        found.append(Promise(f"{loss}: share of FMA peak, N = {n}", own.fma_fraction, PEAK_SHARE, "%", True, reason))
    return found


def _second(scope: Scope, kept: list[Row]) -> list[Promise]:
    rows = _duel(scope, scope.second, [*((loss, "contrastile") for loss in OURS), ("symmetric", "compiled")], kept)
    return [
        _speed(
            f"{loss} against compiled, N = {scope.second}",
            rows[loss, "contrastile"],
            rows["symmetric", "compiled"],
            FASTER_THAN_COMPILED[loss],
        )
        for loss in OURS
    ]


def _small(scope: Scope, kept: list[Row]) -> list[Promise]:
    pairs = list(itertools.product(ALL_LOSSES, ("contrastile", "dense")))
    rows = _duel(scope, scope.small, pairs, kept)
    return [
        _speed(
            f"{loss} against dense {loss}, N = {scope.small}",
            rows[loss, "contrastile"],
            rows[loss, "dense"],
            FASTER_THAN_DENSE_WHEN_SMALL,
        )
        for loss in ALL_LOSSES
    ]


def _nt_xent(scope: Scope, kept: list[Row]) -> list[Promise]:
    own, other = ("nt_xent", "contrastile"), ("symmetric", "contrastile")
    rows = _duel(scope, scope.main, [own, other], kept)
    ratio = _ratio(rows[own], rows[other])
    name = f"nt_xent of {scope.main} rows: time / time of symmetric"
    return [Promise(name, ratio, NT_XENT_SHARE, "x", False, _why_not(rows[own], rows[other]))]


def _memory(scope: Scope, kept: list[Row]) -> list[Promise]:
    found = []
    for n, loss in itertools.product(scope.memory, ALL_LOSSES):
        (row,) = run_job([_case(scope, loss, "contrastile", n)], repeats=0)
        kept.append(row)
        found.append(Promise(f"{loss}: extra memory, N = {n}", row.extra_mib, EXTRA_MIB, "MiB", False, row.reason))
    return found


def _growth(scope: Scope, kept: list[Row]) -> list[Promise]:
    found = []
    for loss in OURS:
        rows = [
            run_job([_case(scope, loss, "contrastile", n)], repeats=scope.repeats, memory=False)[0]
            for n in scope.growth
        ]
        kept.extend(rows)
        name = f"{loss}: spread of time / N^2 from {scope.growth[0]} to {scope.growth[-1]}"
        reason = next((row.reason for row in rows if row.reason), None)
        found.append(Promise(name, cost_spread(rows), GROWTH_SPREAD, "%", False, reason))
    return found


def cost_spread(rows: Sequence[Row]) -> float | None:
    """Largest over smallest time / N^2, less one; time counted in the FMA peak of its moment where that is known.

    The sizes run minutes apart, and a neighbour's load in one of those minutes is no property of the loss.
    """
    if not all(row.repetitions for row in rows):
        return None
    samples = [row.repetitions or [] for row in rows]
    has_peak = all(peak for sample in samples for *_, peak in sample)
    costs = [
        median(seconds * (peak if has_peak and peak else 1.0) for seconds, _, peak in sample) / row.case.rows**2
        for row, sample in zip(rows, samples, strict=True)
    ]
    return max(costs) / min(costs) - 1


def _speed(name: str, own: Row, rival: Row, bound: float) -> Promise:
    return Promise(f"{name}: times faster", _ratio(rival, own), bound, "x", True, _why_not(own, rival))


def _ratio(above: Row, below: Row) -> float | None:
    """Median over repetitions of the ratio within a repetition."""
    if not above.repetitions or not below.repetitions:
        return None
    pairs = zip(above.repetitions, below.repetitions, strict=True)
    return median(over[0] / under[0] for over, under in pairs)


def _why_not(*rows: Row) -> str | None:
    return next((f"{row.case.label}: {row.reason}" for row in rows if row.reason), None)


def _with_unit(value: float, unit: str) -> str:
    return {"x": f"{value:.2f} x", "%": f"{value:.1%}", "MiB": f"{value:.0f} MiB"}[unit]
