"""python -m contrastile.bench.static.forms: both gradients of InfoNCE by the fused kernel or by a strip, estimated.

Cycles of a multiprocessor for 1024 pairs, bf16, from the kernels' bounds: an estimate, nothing is timed. A kernel takes
what its bound leaves where one block fits, and each kernel waits for the one before it:

    fused          its three products
    deterministic  the two launches that it is then: four products
    strip          coefficients, and then two products at the matrix peak. `near`: the strip stays in the L2 cache.
                   `far`: it is written to DRAM and read twice, as are the operands and gradients of a window, and each
                   kernel takes the longer of its cycles and its traffic
    break_even     the share of the matrix peak that the two products must keep for the strip to win, far
    whole_tiles    the share that they keep if each output tile is one block's, of the vendor's usual sizes; a product
                   that splits its reduction among blocks keeps more

The strip serves where `far` is clearly less than `fused`, and break_even less than whole_tiles.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from contrastile.bench.static.launches import bound
from contrastile.bench.static.matrix import TARGETS, WINDOW, Configuration
from contrastile.bench.static.rates import matrix_rate, rates_of
from contrastile.bench.static.table import Row, print_rows
from contrastile.kernels.plans import TilePlan

PAIRS = 1024
STRIP_BYTES, GRADIENT_BYTES = 2, 4  # of a pair's coefficient; of an element, in float32
VENDOR_TILES = ((128, 256), (128, 128), (128, 64), (64, 64))
DEPTHS = (64, 128, 256)
# The fused kernel's best tiles where the launcher takes a strip, by target and features.
FUSED_TILES_INSTEAD = {
    ("sm_80", 128): TilePlan(64, 32, 128, 1, 4, 3, False),
    ("sm_80", 256): TilePlan(64, 32, 256, 1, 8, 3, False),
    ("sm_86", 256): TilePlan(32, 32, 256, 1, 8, 3, False),
    ("sm_90", 256): TilePlan(64, 64, 256, 1, 8, 3, True),
    ("sm_100", 256): TilePlan(64, 64, 256, 1, 8, 2, True),
    ("sm_120", 256): TilePlan(64, 32, 256, 1, 8, 3, False),
    ("gfx942", 256): TilePlan(64, 64, 256, 1, 4, 1, False),
}


def row_of(target: str, depth: int) -> Row:
    product = 2 * depth * PAIRS / matrix_rate(target, "bf16", "ieee")
    fused = 3 * product / _share(target, "fused", depth)
    deterministic = sum(2 * product / _share(target, f"fused {side}", depth) for side in ("anchors", "candidates"))
    coefficients = product / _share(target, "gradient", depth)
    stored = PAIRS * STRIP_BYTES / rates_of(target).dram
    written = max(coefficients, stored)
    far = written + max(2 * product, 2 * stored + _others(target, depth))
    break_even = 2 * product / (fused - written) if fused > written else float("inf")
    found = {"fused": fused, "deterministic": deterministic, "near": coefficients + 2 * product, "far": far}
    return (
        {"target": target, "D": str(depth)}
        | {name: f"{cycles:.0f}" for name, cycles in found.items()}
        | {"far / fused": f"{far / fused:.2f}", "break_even": f"{break_even:.2f}"}
        | {"whole_tiles": f"{whole_tiles(depth, rates_of(target).multiprocessors):.2f}"}
    )


def whole_tiles(depth: int, multiprocessors: int) -> float:
    """How many multiprocessors are busy over all waves of a product of WINDOW x depth, at best."""
    blocks = (-(-WINDOW // rows) * -(-depth // cols) for rows, cols in VENDOR_TILES)
    return max(n / (-(-n // multiprocessors) * multiprocessors) for n in blocks)


def _share(target: str, sweep: str, depth: int) -> float:
    tried = FUSED_TILES_INSTEAD.get((target, depth)) if sweep.startswith("fused") else None
    return bound(Configuration(target, sweep, "bf16", depth, tried=tried)).peak_share_of_one_block


def _others(target: str, depth: int) -> float:
    """Cycles of DRAM for operands and gradients of the two products; these are read and written."""
    return PAIRS * 2 * (depth / WINDOW) * (2 + 2 * GRADIENT_BYTES) / rates_of(target).dram


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m contrastile.bench.static.forms", description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    targets = parser.parse_args(argv).targets
    rows = [row_of(target, depth) for target in targets for depth in DEPTHS]
    print_rows(rows, tuple(rows[0]))
    print("\ncycles of a multiprocessor for 1024 pairs: an estimate from bounds (docs/kernels.md)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
