"""Which kernels, shapes and targets are examined, and what a launch of each would pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from math import isqrt
from typing import Any

import torch
from contrastile.backends.tiled.gradients import NO_STRIP, PAIRS_WITHOUT_STRIP
from contrastile.backends.tiled.sums import NO_SUMS
from contrastile.backends.triton_launches import MERGE_BLOCK, ROW_OPTIONS, launch_options, row_constants
from contrastile.backends.triton_start import blocks_of
from contrastile.bench.static.bounds import Bound, Traits, bound_of, traits_of
from contrastile.bench.static.compile import Buffer, Compiled, compile_kernel
from contrastile.bench.static.tiles import Tile, Walk
from contrastile.kernels.arguments import Gradients, Pairs, Strip, Sums, Weights, Window
from contrastile.kernels.coefficients import coefficients_kernel
from contrastile.kernels.gradient import gradient_kernel
from contrastile.kernels.merge import merge_kernel
from contrastile.kernels.plans import MOST_FUSED_FEATURES, TilePlan, gradient_plan, tile_plan
from contrastile.kernels.positives import positives_kernel
from contrastile.kernels.rows import finish_rows_kernel
from contrastile.kernels.statistics import statistics_kernel

TARGETS = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942")
DEPTHS = (64, 128, 256, 384, 512, 768, 1024, 1536)
FUSED_DEPTHS = tuple(depth for depth in DEPTHS if depth <= MOST_FUSED_FEATURES)
ODD_FUSED_DEPTHS = (16, 32, 96)  # the smallest blocks of features, and one that is not full
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PRECISIONS = ("tf32", "ieee")  # of float32 products; 16-bit ones have but one
ROWS = 32768  # of X and of Y
WINDOW = 4096  # rows and columns of a window: a 32 MiB strip of 16-bit coefficients
FUSED_WINDOW = isqrt(PAIRS_WITHOUT_STRIP)
# Of the statistics sweep: both directions with positives, or of rows alone, with ranks, with groups of pairs that are
# no negatives, within one set of embeddings.
STATISTICS = ("statistics", "statistics rows", "statistics ranks", "statistics groups", "statistics self")
# Of the gradient sweep: both terms (InfoNCE), or that of rows alone, both capped with all sums (gamma), groups, self,
# and the sums alone.
GRADIENTS = ("gradient", "gradient rows", "gradient capped", "gradient groups", "gradient self", "gradient sums")
# Of its sweep in one direction, float32: with guessed shifts, and again for the rows whose guess was too far off.
ONE_DIRECTION = ("gradient guessed", "gradient repair")
# Of the fused sweep: both gradients, one of them by atomic addition, or one a launch; each with the same terms, and
# without a cap there may be masses alone.
FUSED = ("fused", "fused anchors", "fused candidates")
FUSED_TERMS = ("rows", "capped", "masses", "groups")
# That sums come with; the launch of "repair" takes the plan of the one before it.
TERMS_WITH_SUMS = ("capped", "masses", "sums", "guessed", "repair")
# What comes before and after the sweeps; the tiles of the two sweeps differ. The last pass over the rows of dX with its
# moment and all factors, of dY, of the moment alone, and of both roles of one set of embeddings.
ROW_PASSES = ("rows", "rows plain", "rows moment", "rows joined")
AROUND = ("positives statistics", "positives gradient", "merge", "merge capped", *ROW_PASSES)
SWEEPS = ("statistics", "gradient")  # of every depth and dtype
BOUNDED = ("statistics", "gradient", "fused")  # kernels with a bound


@dataclass(frozen=True)
class Configuration:
    """One launch of a kernel."""

    target: str
    sweep: str  # of STATISTICS, GRADIENTS, ONE_DIRECTION, FUSED (and one of FUSED_TERMS), or AROUND
    dtype: str  # of DTYPES
    depth: int
    precision: str = "ieee"  # of float32 products
    aligned: bool = True  # whether tensor descriptors fit the embeddings
    tried: TilePlan | None = None  # in place of the launcher's plan

    def __str__(self) -> str:
        precision = f" {self.precision}" if self.dtype == "fp32" else ""
        return (
            f"{self.target} {self.sweep} {self.dtype}{precision} D={self.depth}{'' if self.aligned else ' unaligned'}"
        )

    @property
    def kernel(self) -> str:
        return self.sweep.split()[0]

    @property
    def terms(self) -> str:
        """What is special about the launch; empty where nothing is."""
        return " ".join(word for word in self.sweep.split()[1:] if word not in ("anchors", "candidates"))

    @property
    def is_bounded(self) -> bool:
        return self.kernel in BOUNDED

    @property
    def plan(self) -> TilePlan:
        found = self.plan_if_any
        assert found is not None
        return found

    @property
    def plan_if_any(self) -> TilePlan | None:
        """None: the launcher does not start this."""
        if self.tried is not None:
            return self.tried
        described = self.target, DTYPES[self.dtype].itemsize * 8, self.depth, self.aligned
        if self.kernel == "fused":
            crowded = self.terms in (*TERMS_WITH_SUMS, "groups")
            return gradient_plan(*described, crowded, capped=self.terms == "capped" and _has_both_gradients(self))
        if self.sweep in (*STATISTICS, "positives statistics", "merge"):
            return tile_plan("statistics", *described, crowded=self.terms == "ranks")
        crowded = self.terms in (*TERMS_WITH_SUMS, "groups") or self.sweep in AROUND
        return tile_plan("gradient", *described, crowded=crowded)


def bounded_configurations(targets: tuple[str, ...] = TARGETS) -> Iterator[Configuration]:
    """Those of the table of bounds: all sweeps of InfoNCE on aligned embeddings, bf16 at every depth."""
    for target in targets:
        for sweep in SWEEPS:
            for depth in DEPTHS:
                yield Configuration(target, sweep, "bf16", depth)
            for precision in PRECISIONS:
                yield Configuration(target, sweep, "fp32", 512, precision)
        yield from _launched(Configuration(target, sweep, "bf16", depth) for sweep in FUSED for depth in FUSED_DEPTHS)


def covering_configurations() -> Iterator[Configuration]:
    """A subset with every target, sweep and dtype, and both an unrolled main loop and a loop."""
    for target in TARGETS:
        yield Configuration(target, "statistics", "bf16", 512)
        yield Configuration(target, "gradient", "bf16", 1024)
        yield from _launched(Configuration(target, "fused", "bf16", depth) for depth in FUSED_DEPTHS)
    for target in ("sm_80", "sm_90", "gfx942"):
        yield Configuration(target, "statistics", "fp32", 512, "tf32")
        yield Configuration(target, "gradient repair", "fp32", 512, "tf32")
        yield from _launched([Configuration(target, "fused candidates capped", "fp16", 128)])
        for sweep in AROUND:
            yield Configuration(target, sweep, "bf16", 512)
    # What takes the most registers: all sums, ranks, groups, pointers.
    for target in ("sm_80", "sm_86", "sm_90"):
        yield Configuration(target, "gradient capped", "fp16", 512)
    yield Configuration("sm_80", "statistics rows", "fp32", 512, "tf32")
    yield Configuration("sm_80", "gradient guessed", "fp32", 512, "ieee")
    yield Configuration("sm_86", "gradient groups", "bf16", 512)
    yield Configuration("sm_90", "statistics ranks", "bf16", 512)
    yield Configuration("sm_90", "statistics groups", "bf16", 512, aligned=False)
    yield Configuration("sm_90", "gradient capped", "bf16", 512, aligned=False)
    yield Configuration("sm_100", "gradient", "bf16", 64)
    yield Configuration("sm_100", "gradient capped", "fp32", 512, "tf32")
    yield Configuration("sm_100", "gradient capped", "bf16", 512, aligned=False)
    yield Configuration("sm_120", "statistics", "bf16", 512, aligned=False)
    yield Configuration("sm_120", "statistics ranks", "fp32", 256, "ieee")
    yield Configuration("sm_120", "fused capped", "bf16", 64)


def all_configurations(targets: tuple[str, ...] = TARGETS) -> Iterator[Configuration]:
    """Whatever the launcher can pick: every dtype and depth, every kind of sweep, embeddings without alignment."""
    for target in targets:
        for sweep in SWEEPS:
            for depth in DEPTHS:
                for dtype in DTYPES:
                    for precision in PRECISIONS if dtype == "fp32" else PRECISIONS[-1:]:
                        yield Configuration(target, sweep, dtype, depth, precision)
                yield Configuration(target, sweep, "bf16", depth, aligned=False)
        for sweep in (*STATISTICS, *GRADIENTS):
            if sweep not in SWEEPS:
                yield Configuration(target, sweep, "bf16", 512)
                yield Configuration(target, sweep, "bf16", 512, aligned=False)
                for precision in PRECISIONS:
                    yield Configuration(target, sweep, "fp32", 512, precision)
        for sweep in ONE_DIRECTION:
            for precision in PRECISIONS:
                yield Configuration(target, sweep, "fp32", 512, precision)
        yield from _launched(_fused_configurations(target))
        for sweep in AROUND:
            yield Configuration(target, sweep, "bf16", 512)
            yield Configuration(target, sweep, "fp32", 512, "tf32")


def _fused_configurations(target: str) -> Iterator[Configuration]:
    for form in FUSED:
        for depth in (*FUSED_DEPTHS, *ODD_FUSED_DEPTHS):
            for dtype in DTYPES:
                yield Configuration(target, form, dtype, depth)
                yield Configuration(target, f"{form} capped", dtype, depth)
        for terms in FUSED_TERMS:
            for depth in FUSED_DEPTHS:
                yield Configuration(target, f"{form} {terms}", "bf16", depth)


def _launched(configurations: Iterable[Configuration]) -> Iterator[Configuration]:
    """Without those that the launcher leaves to another sweep; each once."""
    return (c for c in dict.fromkeys(configurations) if c.plan_if_any is not None)


@cache
def compiled(configuration: Configuration) -> Compiled:
    kernel, arguments = _KERNELS[configuration.kernel]
    plan = configuration.plan
    options = ROW_OPTIONS if configuration.kernel == "rows" else launch_options(plan.num_warps, plan.num_stages)
    return compile_kernel(kernel, arguments(configuration), options, configuration.target)


def _statistics_arguments(configuration: Configuration) -> dict[str, Any]:
    columns = configuration.terms != "rows"
    return {
        **_sweep_arguments(configuration),
        "row_sums": _sums(),
        "col_sums": _sums() if columns else NO_SUMS,
        "positive_logit": _floats(),
        "row_rank": _longs() if configuration.terms == "ranks" else None,
    }


def _coefficients_arguments(configuration: Configuration) -> dict[str, Any]:
    terms, dtype = configuration.terms, DTYPES[configuration.dtype]
    row_sums, col_sums = _gradient_sums(configuration)
    strip = Strip(Buffer(dtype), WINDOW, _floats() if dtype == torch.float16 else None)
    if terms == "repair":
        strip = strip._replace(rows=Buffer(torch.bool))
    return {
        **_sweep_arguments(configuration),
        "weights": _weights(configuration),
        "strip": NO_STRIP if terms == "sums" else strip,
        "row_sums": row_sums,
        "col_sums": col_sums,
        "CAP": terms == "capped",
    }


def _fused_arguments(configuration: Configuration) -> dict[str, Any]:
    row_sums, col_sums = _gradient_sums(configuration)
    owns_candidates = _owns_candidates(configuration)
    return {
        **_tile_arguments(configuration, FUSED_WINDOW),
        "weights": _weights(configuration),
        "gradients": Gradients(
            anchors=None if owns_candidates else _floats(),
            candidates=_floats() if owns_candidates or _has_both_gradients(configuration) else None,
            factor=_floats() if configuration.dtype == "fp16" else None,
        ),
        "row_sums": row_sums,
        "col_sums": col_sums,
        "CAP": configuration.terms == "capped",
        "OWNS_CANDIDATES": owns_candidates,
    }


def _positives_arguments(configuration: Configuration) -> dict[str, Any]:
    arguments = _tile_arguments(configuration, WINDOW)
    del arguments["window"], arguments["anchor_blocks"], arguments["candidate_blocks"]
    return {**arguments, "positive_logit": _floats()}


def _merge_arguments(configuration: Configuration) -> dict[str, Any]:
    sums = _sums(mass=configuration.terms == "capped")
    tiles = WINDOW // configuration.plan.block_cols
    return {"tile_sums": sums, "totals": sums, "tiles": tiles, "length": WINDOW, "BLOCK": MERGE_BLOCK}


def _rows_arguments(configuration: Configuration) -> dict[str, Any]:
    terms, depth, embeddings = configuration.terms, configuration.depth, Buffer(DTYPES[configuration.dtype])
    has_moment = terms != "plain"
    return {
        "sums": _floats(),
        "row_factors": _floats() if not terms else None,
        "other_sums": _floats() if terms == "joined" else None,
        "factor": _floats() if terms != "moment" else None,
        "embeddings": embeddings if has_moment else None,
        "row_stride": depth,
        "feature_stride": 1,
        "gradient": embeddings if terms != "moment" else None,
        "moments": _floats() if has_moment else None,
        "rows": ROWS,
        **row_constants(depth),
        "EMULATE_BF16": False,
    }


# What Triton compiles, and the arguments of a launch.
_KERNELS: dict[str, tuple[Any, Callable[[Configuration], dict[str, Any]]]] = {
    "statistics": (statistics_kernel, _statistics_arguments),
    "gradient": (coefficients_kernel, _coefficients_arguments),
    "fused": (gradient_kernel, _fused_arguments),
    "positives": (positives_kernel, _positives_arguments),
    "merge": (merge_kernel, _merge_arguments),
    "rows": (finish_rows_kernel, _rows_arguments),
}


def _sweep_arguments(configuration: Configuration) -> dict[str, Any]:
    arguments = _tile_arguments(configuration, WINDOW)
    return {**arguments, "GROUP_ROWS": configuration.plan.group_rows, "PARTS": configuration.plan.parts}


def _tile_arguments(configuration: Configuration, window: int) -> dict[str, Any]:
    plan, pairs = configuration.plan, _pairs(configuration)
    anchor_blocks, candidate_blocks = blocks_of(pairs.anchors, pairs.candidates, plan)
    return {
        "pairs": pairs,
        "anchor_blocks": anchor_blocks,
        "candidate_blocks": candidate_blocks,
        "window": Window(0, window, window, window),
        "DEPTH": configuration.depth,
        "BLOCK_ROWS": plan.block_rows,
        "BLOCK_COLS": plan.block_cols,
        "BLOCK_DEPTH": plan.block_depth,
        "PRECISION": configuration.precision,
        "EMULATE_BF16": False,
    }


def _pairs(configuration: Configuration) -> Pairs:
    depth = configuration.depth
    # An odd first element or stride is what rules tensor descriptors out.
    stride = depth if configuration.aligned else depth + 1
    embeddings = Buffer(DTYPES[configuration.dtype], (ROWS, depth))
    grouped = configuration.terms == "groups"
    return Pairs(
        anchors=embeddings,
        candidates=embeddings,
        anchor_stride=stride,
        candidate_stride=stride,
        scale=_floats(),
        positives=_longs(),
        row_groups=_longs() if grouped else None,
        col_groups=_longs() if grouped else None,
        self_offset=0 if configuration.terms == "self" else None,
        rows=ROWS,
        cols=ROWS,
    )


def _weights(configuration: Configuration) -> Weights:
    columns = configuration.terms not in ("rows", "guessed", "repair")
    return Weights(_floats(), _floats(), _floats() if columns else None, _floats() if columns else None, _floats())


def _gradient_sums(configuration: Configuration) -> tuple[Sums, Sums]:
    """By row and by column, met on the way."""
    if configuration.terms == "guessed":
        return _sums(), NO_SUMS
    if configuration.terms in ("capped", "sums"):
        return _sums(mass=True), _sums(mass=True)
    if configuration.terms == "masses":
        return Sums(None, None, _floats()), Sums(None, None, _floats())
    return NO_SUMS, NO_SUMS


def _owns_candidates(configuration: Configuration) -> bool:
    return "candidates" in configuration.sweep.split()


def _has_both_gradients(configuration: Configuration) -> bool:
    return not {"anchors", "candidates"} & set(configuration.sweep.split())


def _floats() -> Buffer:
    return Buffer(torch.float32)


def _longs() -> Buffer:
    return Buffer(torch.int64)


def _sums(mass: bool = False) -> Sums:
    return Sums(_floats(), _floats(), _floats() if mass else None)


def traits(configuration: Configuration) -> Traits:
    return traits_of(compiled(configuration))


@cache
def bound(configuration: Configuration) -> Bound:
    """Of a configuration that is_bounded."""
    plan = configuration.plan
    tile = Tile(
        target=configuration.target,
        plan=plan,
        depth=configuration.depth,
        dtype=configuration.dtype,
        precision=configuration.precision,
        element_bytes=DTYPES[configuration.dtype].itemsize,
        tile_cols=-(-WINDOW // plan.block_cols),
        walk=_walk(configuration) if configuration.kernel == "fused" else None,
    )
    try:
        return bound_of(tile, compiled(configuration))
    except RuntimeError as error:
        raise RuntimeError(f"{configuration}: {error}") from error


def _walk(configuration: Configuration) -> Walk:
    owns_candidates = _owns_candidates(configuration)
    walked = configuration.plan.block_rows if owns_candidates else configuration.plan.block_cols
    return Walk(-(-FUSED_WINDOW // walked), owns_candidates, _has_both_gradients(configuration))
