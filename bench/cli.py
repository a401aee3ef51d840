"""python -m contrastile bench: measure, print, write, plot."""

from __future__ import annotations

import argparse
import itertools
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from contrastile.bench.cases import DEVICES, DTYPES, LOSSES, SQUARE_LOSSES, Case
from contrastile.bench.harness import run_cases
from contrastile.bench.implementations import IMPLEMENTATIONS


def main(argv: Sequence[str]) -> int:
    """Returns 0, or 1 where a promise does not hold."""
    options = _parser().parse_args(argv)
    try:
        from contrastile.bench import report
    except ImportError as missing:
        raise SystemExit(f"bench needs rich: pip install 'contrastile[bench]' ({missing})") from missing

    command = shlex.join(["python", "-m", "contrastile", "bench", *argv])
    if options.must_reach:
        from contrastile.bench.promises import Scope, measure_promises

        findings = measure_promises(Scope(threads=options.threads, repeats=options.repeats), report.print_promise)
        rows, promises = findings.rows, findings.promises
        report.CONSOLE.print(report.promise_table(promises))
    else:
        rows = run_cases(_cases(options), repeats=options.repeats, limit_seconds=options.limit, on_row=report.print_row)
        promises = []
        report.CONSOLE.print(report.row_table(rows), *report.notes(rows), sep="\n")

    if options.out:
        report.write_results(options.out, command, rows, promises)
    if options.plot:
        from contrastile.bench.plot import plot

        plot([row.as_dict() for row in rows], options.plot)
    return 0 if all(promise.holds for promise in promises) else 1


def _cases(options: argparse.Namespace) -> list[Case]:
    """The grid of the options, without the combinations that do not exist."""
    backends = options.backends or [None]
    names = options.implementations or [name for name, of in IMPLEMENTATIONS.items() if options.device in of.devices]
    grid = itertools.product(options.losses, options.sizes, names)
    return [
        Case(loss, name, rows, cols, options.dim, options.dtype, options.threads, backend, options.device)
        for loss, (rows, cols), name in grid
        if loss in IMPLEMENTATIONS[name].losses and (rows == cols or loss not in SQUARE_LOSSES)
        for backend in (backends if name == "contrastile" else [None])
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m contrastile bench",
        description="Seconds, memory and float64 error of forward + backward, each case in a fresh process.",
    )
    add = parser.add_argument
    add("--sizes", type=_listed(_size), default=[(2048, 2048), (8192, 8192)], help="N or NxM, e.g. 2048,8192")
    add("--losses", type=_listed(_one_of(LOSSES)), default=["symmetric"], help=", ".join(LOSSES))
    names = tuple(IMPLEMENTATIONS)
    add("--implementations", type=_listed(_one_of(names)), help=f"{', '.join(names)} (default: all for the device)")
    add("--backends", type=_listed(str), help="of contrastile, e.g. cpu,eager (default: its own choice)")
    add("--dim", type=int, default=512, help="features of a row (default 512)")
    add("--dtype", choices=DTYPES, default="float32")
    add("--device", choices=DEVICES, default="cpu", help="cuda: a GPU; interpreter: a dry run, with TRITON_INTERPRET=1")
    add("--threads", type=int, default=2)
    add("--repeats", type=int, default=5, help="repetitions whose median is reported (default 5)")
    add("--limit", type=float, default=300.0, help="seconds after which a case is given up (default 300)")
    add("--out", type=Path, help="results file; a run of the same command in it is replaced")
    add("--plot", type=Path, help="picture of time and memory against N, PNG")
    add("--must-reach", action="store_true", help="measure and judge the package's performance promises (half an hour)")
    return parser


def _listed(item: Callable[[str], object]) -> Callable[[str], list[object]]:
    def parse(text: str) -> list[object]:
        return [item(part) for part in text.split(",")]

    return parse


def _one_of(names: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(names)}")
        return text

    return parse


def _size(text: str) -> tuple[int, int]:
    rows, _, cols = text.partition("x")
    try:
        size = int(rows), int(cols or rows)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 2048 or 2048x8192") from None
    if min(size) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: sizes are positive")
    return size
