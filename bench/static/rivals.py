"""python -m contrastile.bench.static.rivals: the static count of whole losses, forward and backward, ours and others'.

Ours are compiled for the shapes of their launches, others' are recorded (rival_launches.py), compiled and counted.
docs/rival-kernels.md has the table and what it assumes.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import triton
from contrastile.backends.tiled.gradients import MOST_PAIRS
from contrastile.bench.static import bounds
from contrastile.bench.static.compile import Compiled, compile_kernel
from contrastile.bench.static.disassembly import parse_sass
from contrastile.bench.static.instructions import matrix_kind
from contrastile.bench.static.launches import bound, compiled
from contrastile.bench.static.matrix import Configuration
from contrastile.bench.static.rates import blocks_resident, matrix_rate, rates_of
from contrastile.bench.static.rival_launches import RIVALS, Cache, N, work_of_warp

DEPTHS = (512, 1024)
STRIP = 2 * N * N  # bytes of all coefficients
WINDOW = isqrt(MOST_PAIRS)  # of both sweeps: gradients of so many features leave the strip as much room
VENDOR_TILE = (128, 256)  # of the vendor's products, as far as the L2 cache sees them
# Losses of ours, and what part of others' matrix time they should take at most.
AIMS = {
    "symmetric": {"memeff": 0.8, "Inf-CL": 0.2},
    "one sweep": {"memeff": 0.6, "Inf-CL": 0.15},
}
COMMITTED = Path(__file__).parent / "rivals.csv"
KEY = ("target", "D", "loss", "part")
FIGURES = (*bounds.PIPES, "busiest", "dram_GB", "dram_least_GB", "l2_GB")
COLUMNS = (
    *(*KEY, "launches", "tile", "warps", "kind", "registers", "spilled", "shared_bytes", "blocks", "products"),
    *(*FIGURES, "version", "triton"),
)
Row = dict[str, str]


@dataclass(frozen=True)
class Chip:
    gigahertz: float
    l2: int  # bytes


# The cards of rates.py, by their data sheets.
CHIPS = {"sm_80": Chip(1.41, 40 << 20), "sm_90": Chip(1.83, 50 << 20), "sm_100": Chip(1.85, 126 << 20)}


def others_rows(loss: str, target: str, depth: int) -> list[Row]:
    """A row for each kernel that it launches."""
    launches, rows = RIVALS[loss].launches(target, depth), []
    for name in dict.fromkeys(launch.kernel.__name__ for launch in launches):
        alike = [launch for launch in launches if launch.kernel.__name__ == name]
        launch, programs = alike[0], sum(launch.programs for launch in alike)
        kernel = compile_kernel(launch.kernel, launch.arguments, launch.options, target)
        blocks, loops = parse_sass(kernel.assembly), launch.loops(depth)
        kind = matrix_kind({i.opcode for block in blocks for i in block.instructions})
        work = work_of_warp(blocks, loops) * kernel.num_warps
        taken = [one for loop in loops for one in loop.taken()]
        if kind == "tcgen05":
            for often, product in taken:
                work += product.tcgen05() * often
        cycles = bounds.cycles_of(target, work, matrix_rate(target, "bf16", "ieee"))
        described = of_kernel(kernel, "x".join(map(str, launch.sizes())), kind)
        resident = rates_of(target).multiprocessors * max(1, int(described["blocks"]))
        rows.append(
            {**key_of(target, depth, loss, name), "launches": str(len(alike)), **described}
            | figures(
                target,
                products=sum(often * product.flop for often, product in taken) * programs / (2 * N * N * depth),
                cycles={pipe: n * programs for pipe, n in cycles.items()},
                drams=[launch.dram(depth, resident, cache) * len(alike) for cache in caches_of(target)],
                l2=(work.loaded + work.stored) * programs,
            )
        )
    return rows


def our_rows(loss: str, target: str, depth: int) -> list[Row]:
    """InfoNCE: statistics, coefficients, two products. Gamma: capped coefficients with all sums, two products."""
    rows = []
    for sweep in ("statistics", "gradient") if loss == "symmetric" else ("gradient capped",):
        configuration = Configuration(target, sweep, "bf16", depth)
        plan, kernel, found = configuration.plan, compiled(configuration), bound(configuration)
        windows, tiles = (N // WINDOW) ** 2, N * N // (plan.block_rows * plan.block_cols)
        tower = 2 * WINDOW * depth  # of a window; columns are walked by every group of tile rows
        groups = WINDOW // (plan.group_rows * plan.block_rows)
        stored, strip = found.work.stored * tiles, 0 if sweep == "statistics" else STRIP
        sums = 2 * (stored - strip)  # they come back to be joined
        rows.append(
            {**key_of(target, depth, loss, sweep), "launches": str(windows)}
            | of_kernel(kernel, f"{plan.block_rows}x{plan.block_cols}x{plan.block_depth}", found.kind)
            | figures(
                target,
                products=1,
                cycles={pipe: n * tiles for pipe, n in found.cycles.items()},
                drams=[
                    windows * (tower + cache.again(tower, groups)) + sums + strip * strip_beyond(cache, depth)
                    for cache in caches_of(target)
                ],
                l2=found.work.loaded * tiles + stored,
            )
        )
    moved = 2 * N * (N // WINDOW) * depth * (2 + 4 + 4)  # operands; gradients, read and written
    cycles = {"matrix": 2 * 2 * N * N * depth / matrix_rate(target, "bf16", "ieee")}
    rows.append(
        {**key_of(target, depth, loss, "products"), "launches": str(2 * (N // WINDOW) ** 2)}
        | {"kind": "vendor", "spilled": "0", "blocks": "1"}
        | figures(
            *(target, 2, cycles),
            drams=[moved + 2 * STRIP * strip_beyond(cache, depth) for cache in caches_of(target)],
            l2=2 * 2 * N * N * depth * sum(1 / size for size in VENDOR_TILE) + moved,
        )
    )
    return rows


def caches_of(target: str) -> tuple[Cache, Cache]:
    return Cache(CHIPS[target].l2, keeps=False), Cache(CHIPS[target].l2, keeps=True)


def strip_beyond(cache: Cache, depth: int) -> float:
    """The share of a strip that leaves the chip: all of it, or what does not fit beside operands and gradients."""
    if not cache.keeps:
        return 1
    strip, others = 2 * WINDOW**2, 2 * WINDOW * depth * (2 + 4)
    return min(1, max(0, strip + others - cache.size) / strip)


def key_of(target: str, depth: int, loss: str, part: str) -> Row:
    of_package = {"version": RIVALS[loss].version or "" if loss in RIVALS else "", "triton": triton.__version__}
    return {"target": target, "D": str(depth), "loss": loss, "part": part} | of_package


def of_kernel(kernel: Compiled, tile: str, kind: str) -> Row:
    fit = blocks_resident(kernel.target, kernel.num_warps, kernel.registers, kernel.shared, kernel.tensor_memory)
    numbers = {"warps": kernel.num_warps, "registers": kernel.registers, "spilled": kernel.spilled}
    numbers |= {"shared_bytes": kernel.shared, "blocks": fit}
    return {"tile": tile, "kind": kind} | {name: str(number) for name, number in numbers.items()}


def figures(target: str, products: float, cycles: dict[str, float], drams: Sequence[float], l2: float) -> Row:
    """Milliseconds and GB of the whole chip, from cycles of a multiprocessor and bytes."""
    per_ms = rates_of(target).multiprocessors * CHIPS[target].gigahertz * 1e6
    found = {pipe: cycles.get(pipe, 0) / per_ms for pipe in bounds.PIPES}
    found |= {"busiest": max(found.values()), "dram_GB": drams[0] / 1e9, "dram_least_GB": drams[1] / 1e9}
    found |= {"l2_GB": l2 / 1e9}
    return {name: f"{value:.2f}" for name, value in found.items()} | {"products": f"{products:g}"}


def wholes(rows: Sequence[Row]) -> list[Row]:
    """A row for each loss: its kernels, one after the other."""
    found = []
    for loss in dict.fromkeys(tuple(row[name] for name in KEY[:3]) for row in rows):
        parts = [row for row in rows if tuple(row[name] for name in KEY[:3]) == loss]
        found.append(
            dict(zip(KEY[:3], loss, strict=True))
            | {"products": f"{sum(float(row['products']) for row in parts):g}"}
            | {name: f"{sum(float(row[name]) for row in parts):.2f}" for name in FIGURES}
            | {"busy": ", ".join(max(bounds.PIPES, key=lambda pipe: float(row[pipe])) for row in parts)}
            | {"instructions": ", ".join(row["kind"] for row in parts)}
            | {"spilled": max((row["spilled"] for row in parts), key=int)}
            | {"fits": "no" if any(row["blocks"] == "0" for row in parts) else "yes"}
        )
    return found


def comparisons(rows: Sequence[Row]) -> list[Row]:
    """Ours by others', against what was aimed at."""
    losses = {tuple(row[name] for name in KEY[:3]): row for row in wholes(rows)}
    found = []
    for (target, depth, loss), own in losses.items():
        for rival, aim in AIMS.get(loss, {}).items():
            other = losses[target, depth, rival]
            names = ("matrix", "busiest", "dram_GB", "dram_least_GB")
            share = {name: round(float(own[name]) / float(other[name]), 2) for name in names}
            less = [share[name] < 1 for name in names[2:]]
            found.append(
                {"target": target, "D": depth, "ours": loss, "by": rival}
                | {name: f"{value:.2f}" for name, value in share.items()}
                | {"aim": f"{aim:g}", "matrix holds": "yes" if share["matrix"] <= aim else "no"}
                | {"less DRAM": "yes" if all(less) else "depends" if any(less) else "no"}
            )
    return found


def markdown(rows: Sequence[Row]) -> list[str]:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def read_rows() -> list[Row]:
    with COMMITTED.open(newline="") as file:
        return list(csv.DictReader(file))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m contrastile.bench.static.rivals", description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--write", action="store_true", help="put the figures into the committed table")
    options = parser.parse_args(argv)
    rows, missing = [], [rival.package for rival in RIVALS.values() if rival.version is None]
    for target in options.targets:
        for depth in DEPTHS:
            for loss in (*AIMS, *RIVALS):
                if loss in AIMS:
                    rows += our_rows(loss, target, depth)
                elif RIVALS[loss].package not in missing:
                    rows += others_rows(loss, target, depth)
    print("\n".join([*markdown(wholes(rows)), "", *([] if missing else markdown(comparisons(rows)))]))
    print("a bound, not a prediction (docs/rival-kernels.md)")
    for package in missing:
        print(f"{package} is not installed: pip install --no-deps {package}")
    if options.write:
        if missing or len(options.targets) < len(CHIPS):
            parser.error("--write needs all targets and the packages of all others")
        with COMMITTED.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
