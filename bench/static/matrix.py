"""Which kernels, shapes and targets are examined, and what a launch of each would pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from contrastile.bench.static.bounds import Bound, Tile, bound_of
from contrastile.bench.static.compile import Buffer, Compiled, compile_kernel
from contrastile.kernels.coefficients import Strip, Weights, coefficients_kernel
from contrastile.kernels.plans import TilePlan, tile_plan
from contrastile.kernels.statistics import statistics_kernel
from contrastile.kernels.tiles import Pairs, Sums, Window
from triton.tools.tensor_descriptor import TensorDescriptor

TARGETS = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942")
DEPTHS = (64, 128, 256, 384, 512, 768, 1024, 1536)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PRECISIONS = ("tf32", "ieee")  # of float32 products; 16-bit ones have but one
ROWS = 32768  # of X and of Y
WINDOW = 4096  # rows and columns of a window: a 32 MiB strip of 16-bit coefficients
# Of the statistics sweep: both directions with positives, or of rows alone, with ranks, with groups of pairs that are
# no negatives, within one set of embeddings.
STATISTICS = ("statistics", "statistics rows", "statistics ranks", "statistics groups", "statistics self")
# Of the gradient sweep: both terms (InfoNCE), or that of rows alone, both capped with all sums (gamma), groups, self.
GRADIENTS = ("gradient", "gradient rows", "gradient capped", "gradient groups", "gradient self")
SWEEPS = ("statistics", "gradient")  # the ones whose bounds are kept


@dataclass(frozen=True, order=True)
class Configuration:
    """One launch of a tile kernel."""

    target: str
    sweep: str  # of STATISTICS or GRADIENTS
    dtype: str  # of DTYPES
    depth: int
    precision: str = "ieee"  # of float32 products
    aligned: bool = True  # whether tensor descriptors fit the embeddings

    def __str__(self) -> str:
        precision = f" {self.precision}" if self.dtype == "fp32" else ""
        return (
            f"{self.target} {self.sweep} {self.dtype}{precision} D={self.depth}{'' if self.aligned else ' unaligned'}"
        )

    @property
    def plan(self) -> TilePlan:
        return tile_plan(self.sweep.split()[0], self.target, DTYPES[self.dtype].itemsize * 8, self.depth, self.aligned)


def bounded_configurations(targets: tuple[str, ...] = TARGETS) -> Iterator[Configuration]:
    """Those of the table of bounds: both sweeps of InfoNCE on aligned embeddings, bf16 at every depth."""
    for target in targets:
        for sweep in SWEEPS:
            for depth in DEPTHS:
                yield Configuration(target, sweep, "bf16", depth)
            for precision in PRECISIONS:
                yield Configuration(target, sweep, "fp32", 512, precision)


def covering_configurations() -> Iterator[Configuration]:
    """A subset with every target, sweep and dtype, and both an unrolled main loop and a loop."""
    for target in TARGETS:
        yield Configuration(target, "statistics", "bf16", 512)
        yield Configuration(target, "gradient", "bf16", 1024)
    for target in ("sm_80", "sm_90", "gfx942"):
        yield Configuration(target, "statistics", "fp32", 512, "tf32")
    yield Configuration("sm_90", "gradient capped", "fp16", 512)
    yield Configuration("sm_90", "statistics groups", "bf16", 512, aligned=False)
    yield Configuration("sm_100", "gradient", "bf16", 64)
    yield Configuration("sm_120", "statistics ranks", "fp32", 256, "ieee")


def all_configurations(targets: tuple[str, ...] = TARGETS) -> Iterator[Configuration]:
    """Whatever the launcher can pick: every dtype and depth, every kind of sweep, embeddings without alignment."""
    for target in targets:
        for sweep in SWEEPS:
            for depth in DEPTHS:
                for dtype in DTYPES:
                    for precision in PRECISIONS if dtype == "fp32" else PRECISIONS[-1:]:
                        yield Configuration(target, sweep, dtype, depth, precision)
                if Configuration(target, sweep, "bf16", depth).plan.descriptors:
                    yield Configuration(target, sweep, "bf16", depth, aligned=False)
        for sweep in (*STATISTICS, *GRADIENTS):
            if sweep not in SWEEPS:
                yield Configuration(target, sweep, "bf16", 512)
                yield Configuration(target, sweep, "fp32", 512, "tf32")


@cache
def compiled(configuration: Configuration) -> Compiled:
    plan, precision = configuration.plan, configuration.precision
    kind = configuration.sweep
    arguments: dict[str, Any] = {
        "pairs": _pairs(configuration),
        "window": Window(0, WINDOW, WINDOW, WINDOW),
        "DEPTH": configuration.depth,
        "BLOCK_ROWS": plan.block_rows,
        "BLOCK_COLS": plan.block_cols,
        "BLOCK_DEPTH": plan.block_depth,
        "GROUP_ROWS": plan.group_rows,
        "DESCRIPTORS": plan.descriptors,
        "PRECISION": precision,
        "EMULATE_BF16": False,
    }
    options = {"num_warps": plan.num_warps, "num_stages": plan.num_stages}
    if kind in STATISTICS:
        columns = kind != "statistics rows"
        arguments |= {
            "row_sums": _sums(),
            "col_sums": _sums() if columns else Sums(None, None, None),
            "positive_logit": _floats(),
            "row_rank": _longs() if kind == "statistics ranks" else None,
        }
        return compile_kernel(statistics_kernel, arguments, options, configuration.target)
    capped, columns = kind == "gradient capped", kind != "gradient rows"
    sums = _sums(mass=True) if capped else Sums(None, None, None)
    dtype = DTYPES[configuration.dtype]
    arguments |= {
        "weights": Weights(
            _floats(), _floats(), _floats() if columns else None, _floats() if columns else None, _floats()
        ),
        "strip": Strip(Buffer(dtype), WINDOW, _floats() if dtype == torch.float16 else None),
        "row_sums": sums,
        "col_sums": sums,
        "CAP": capped,
    }
    return compile_kernel(coefficients_kernel, arguments, options, configuration.target)


def _pairs(configuration: Configuration) -> Pairs:
    plan, depth = configuration.plan, configuration.depth
    # An odd first element or stride is what rules tensor descriptors out.
    stride = depth if configuration.aligned else depth + 1
    embeddings = Buffer(DTYPES[configuration.dtype], (ROWS, depth))
    anchors: Any = embeddings
    candidates: Any = embeddings
    if plan.descriptors:
        anchors = TensorDescriptor.from_tensor(embeddings, [plan.block_rows, plan.block_depth])
        candidates = TensorDescriptor.from_tensor(embeddings, [plan.block_cols, plan.block_depth])
    grouped = configuration.sweep.endswith("groups")
    return Pairs(
        anchors=anchors,
        candidates=candidates,
        anchor_stride=stride,
        candidate_stride=stride,
        scale=_floats(),
        positives=_longs(),
        row_groups=_longs() if grouped else None,
        col_groups=_longs() if grouped else None,
        self_offset=0 if configuration.sweep.endswith("self") else None,
        rows=ROWS,
        cols=ROWS,
    )


def _floats() -> Buffer:
    return Buffer(torch.float32)


def _longs() -> Buffer:
    return Buffer(torch.int64)


def _sums(mass: bool = False) -> Sums:
    return Sums(_floats(), _floats(), _floats() if mass else None)


def bound(configuration: Configuration) -> Bound:
    plan = configuration.plan
    tile = Tile(
        target=configuration.target,
        plan=plan,
        depth=configuration.depth,
        dtype=configuration.dtype,
        precision=configuration.precision,
        element_bytes=DTYPES[configuration.dtype].itemsize,
        tile_cols=-(-WINDOW // plan.block_cols),
    )
    try:
        return bound_of(tile, compiled(configuration))
    except RuntimeError as error:
        raise RuntimeError(f"{configuration}: {error}") from error
