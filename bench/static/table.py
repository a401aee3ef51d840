"""The table of bounds: rows, the committed copy, what has become worse, and how it prints."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path

import triton
from contrastile.bench.static.bounds import PIPES, Bound
from contrastile.bench.static.compile import Compiled
from contrastile.bench.static.launches import bound, compiled
from contrastile.bench.static.matrix import TARGETS, Configuration, bounded_configurations
from contrastile.kernels.plans import TilePlan

COMMITTED = Path(__file__).parent / "bounds.csv"
LARGEST_LOSS = 0.03  # of a bound, before it is a regression
KEY = ("target", "sweep", "dtype", "D", "source")
BOUNDS = ("peak_share", "one_block_share")
COLUMNS = (
    *KEY,
    *("tile", "warps", "stages", "held", "kind", "registers", "spilled", "shared_bytes", "blocks"),
    *PIPES,
    *("pipe", *BOUNDS, "l2_demand", "dram_demand", "compiler"),
)
# What a terminal has room for.
PRINTED = tuple(c for c in COLUMNS if c not in ("stages", "held", "shared_bytes", "compiler"))

Row = dict[str, str]


def row_of(configuration: Configuration) -> Row:
    """Cycles are whole, shares have three digits: what a change of compiler moves by chance stays out of sight."""
    key = {
        "target": configuration.target,
        "sweep": configuration.sweep,
        "dtype": dtype_of(configuration),
        "D": f"{configuration.depth}{'' if configuration.aligned else ' odd'}",
        "source": "triton",
    }
    compiler = f"triton {triton.__version__}"
    return row(key, configuration.plan, compiled(configuration), bound(configuration), compiler)


def row(key: Row, plan: TilePlan, kernel: Compiled, found: Bound, compiler: str) -> Row:
    return {
        **key,
        "tile": f"{plan.block_rows}x{plan.block_cols}x{plan.block_depth}",
        "warps": str(plan.num_warps),
        "stages": str(plan.num_stages),
        "held": str(found.stages),
        "kind": found.kind,
        "registers": str(kernel.registers),
        "spilled": str(kernel.spilled),
        "shared_bytes": str(kernel.shared),
        "blocks": str(found.blocks),
        **{pipe: f"{found.cycles[pipe]:.0f}" for pipe in PIPES},
        "pipe": found.pipe,
        "peak_share": f"{found.peak_share:.3f}",
        "one_block_share": f"{found.peak_share_of_one_block:.3f}",
        "l2_demand": f"{found.l2_demand:.0f}",
        "dram_demand": f"{found.dram_demand:.2f}",
        "compiler": compiler,
    }


def dtype_of(configuration: Configuration) -> str:
    """Of products: tf32 and float32 share their inputs' dtype."""
    return "tf32" if configuration.dtype == "fp32" and configuration.precision == "tf32" else configuration.dtype


def is_kept(row: Row) -> bool:
    """Whether a row of Triton's is one of the committed table."""
    return _key(row) in {
        (c.target, c.sweep, dtype_of(c), str(c.depth), "triton") for c in bounded_configurations((row["target"],))
    }


def read_rows(path: Path = COMMITTED) -> list[Row]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or set(rows[0]) != set(COLUMNS):
        raise ValueError(f"{path.name} has other columns than {', '.join(COLUMNS)}")
    return rows


def text_of(rows: Iterable[Row]) -> str:
    """As it is committed: sorted, so that a change shows as changed lines."""
    text = StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    ordered: list[Row] = sorted(rows, key=_order)
    writer.writerows(ordered)
    return text.getvalue()


def regressions(committed: Iterable[Row], now: Iterable[Row]) -> list[str]:
    """Bounds that fell by more than LARGEST_LOSS, in words. Raises ValueError for a row that was never committed."""
    known = {_key(row): row for row in committed}
    found = []
    for row in now:
        before = known.get(_key(row))
        if before is None:
            raise ValueError(f"no committed bound of {' '.join(_key(row))}: write the table anew")
        for name in BOUNDS:
            if float(row[name]) < (1 - LARGEST_LOSS) * float(before[name]):
                found.append(f"{' '.join(_key(row))}: {name} was {before[name]}, is {row[name]} (by {row['pipe']})")
    return found


def print_rows(rows: Sequence[Row], columns: Sequence[str] = PRINTED) -> None:
    """With rich where it is installed, in plain columns otherwise."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("\n".join(plain_lines(rows, columns)))
        return
    console = Console()
    width = sum(max(len(c), *(len(row[c]) for row in rows)) + 2 for c in columns)
    if width > console.width:  # rich would cut words to fit
        print("\n".join(plain_lines(rows, columns)))
        return
    table = Table(*columns, box=None, header_style="bold")
    for row in rows:
        table.add_row(*(row[c] for c in columns))
    console.print(table)


def plain_lines(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> list[str]:
    widths = {c: max(len(c), *(len(row[c]) for row in rows)) for c in columns}
    lines = ["  ".join(f"{c:<{widths[c]}}" for c in columns)]
    lines += ["  ".join(f"{row[c]:<{widths[c]}}" for c in columns) for row in rows]
    return [line.rstrip() for line in lines]


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def _order(row: Row) -> tuple[int, str, str, int, str]:
    return TARGETS.index(row["target"]), row["sweep"], row["dtype"], int(row["D"]), row["source"]
