"""What a launch of each configuration would pass, and what it compiles to."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from contrastile.backends.tiled.gradients import NO_STRIP
from contrastile.backends.tiled.sums import NO_SUMS
from contrastile.backends.triton_launches import MERGE_BLOCK, ROW_OPTIONS, SOFTMAX_BLOCK, launch_options, row_constants
from contrastile.backends.triton_rows import row_launch
from contrastile.backends.triton_start import blocks_of
from contrastile.bench.static.bounds import Bound, Traits, bound_of, traits_of
from contrastile.bench.static.compile import Buffer, Compiled, compile_kernel
from contrastile.bench.static.matrix import (
    DTYPES,
    FUSED_WINDOW,
    ROW_LOSSES,
    ROWS,
    WINDOW,
    Configuration,
    has_both_gradients,
)
from contrastile.bench.static.tiles import Tile, Walk
from contrastile.kernels.arguments import Gradients, Pairs, Strip, Sums, Weights, Window
from contrastile.kernels.coefficients import coefficients_kernel
from contrastile.kernels.gradient import gradient_kernel
from contrastile.kernels.merge import merge_kernel
from contrastile.kernels.positives import positives_kernel
from contrastile.kernels.row_losses import bridge_rows_kernel, dot_product_rows_kernel
from contrastile.kernels.rows import finish_rows_kernel
from contrastile.kernels.softmax import softmax_weights_kernel
from contrastile.kernels.statistics import statistics_kernel


@cache
def compiled(configuration: Configuration) -> Compiled:
    kernel, arguments = _KERNELS[configuration.kernel]
    plan = configuration.plan
    options = launch_options(plan.num_warps, plan.num_stages)
    if configuration.kernel in ("rows", "softmax"):
        options = ROW_OPTIONS
    elif configuration.sweep in ROW_LOSSES:
        options = row_launch(configuration.depth)[1]
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
        "FUNCTION": _function(configuration),
    }


def _fused_arguments(configuration: Configuration) -> dict[str, Any]:
    row_sums, col_sums = _gradient_sums(configuration)
    owns_candidates = _owns_candidates(configuration)
    return {
        **_tile_arguments(configuration, FUSED_WINDOW),
        "weights": _weights(configuration),
        "gradients": Gradients(
            anchors=None if owns_candidates else _floats(),
            candidates=_floats() if owns_candidates or has_both_gradients(configuration) else None,
            factor=_floats() if configuration.dtype == "fp16" else None,
        ),
        "row_sums": row_sums,
        "col_sums": col_sums,
        "FUNCTION": _function(configuration),
        "OWNS_CANDIDATES": owns_candidates,
        "ROW_LANES": configuration.plan.row_lanes,
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


def _softmax_arguments(configuration: Configuration) -> dict[str, Any]:
    by_column = not configuration.terms
    return {
        "row_max": _floats(),
        "row_sum": _floats(),
        "col_max": _floats() if by_column else None,
        "col_sum": _floats() if by_column else None,
        "positive_logit": _floats(),
        "positives": _longs(),
        "gain": 1 / ROWS,
        "weights": Weights(*(_floats() for _ in Weights._fields)),
        "losses": _floats(),
        "rows": ROWS,
        "SELF": configuration.terms == "self",
        "BLOCK": SOFTMAX_BLOCK,
    }


def _bridge_arguments(configuration: Configuration) -> dict[str, Any]:
    return {**_row_loss_arguments(configuration, 3), "time": _floats()}


def _dots_arguments(configuration: Configuration) -> dict[str, Any]:
    return {**_row_loss_arguments(configuration, 4), "DIFFERENCE": configuration.terms == "difference"}


def _row_loss_arguments(configuration: Configuration, inputs: int) -> dict[str, Any]:
    embeddings = (Buffer(DTYPES[configuration.dtype]),) * inputs
    return {
        "inputs": embeddings,
        "strides": (configuration.depth,) * inputs,
        "gain": _floats(),
        "values": _floats(),
        "gradients": embeddings,
        "rows": ROWS,
        **row_launch(configuration.depth)[0],
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
    "softmax": (softmax_weights_kernel, _softmax_arguments),
    "bridge": (bridge_rows_kernel, _bridge_arguments),
    "dots": (dot_product_rows_kernel, _dots_arguments),
}


def _sweep_arguments(configuration: Configuration) -> dict[str, Any]:
    arguments = _tile_arguments(configuration, WINDOW)
    plan = configuration.plan
    return {**arguments, "GROUP_ROWS": plan.group_rows, "PARTS": plan.parts, "ROW_LANES": plan.row_lanes}


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
        row_ceiling=_floats() if configuration.terms == "ceilings" else None,
        self_offset=0 if configuration.terms == "self" else None,
        rows=ROWS,
        cols=ROWS,
    )


def _weights(configuration: Configuration) -> Weights:
    columns = configuration.terms not in ("rows", "guessed", "repair", "sigmoid")
    return Weights(_floats(), _floats(), _floats() if columns else None, _floats() if columns else None, _floats())


def _function(configuration: Configuration) -> str:
    return configuration.terms if configuration.terms in ("capped", "sigmoid") else "exponential"


def _gradient_sums(configuration: Configuration) -> tuple[Sums, Sums]:
    """By row and by column, met on the way."""
    if configuration.terms == "guessed":
        return _sums(), NO_SUMS
    if configuration.terms in ("capped", "sums"):
        return _sums(mass=True), _sums(mass=True)
    if configuration.terms == "sigmoid":
        return Sums(None, None, _floats(), _floats()), NO_SUMS
    if configuration.terms == "masses":
        return Sums(None, None, _floats()), Sums(None, None, _floats())
    return NO_SUMS, NO_SUMS


def _owns_candidates(configuration: Configuration) -> bool:
    return "candidates" in configuration.sweep.split()


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
    return Walk(-(-FUSED_WINDOW // walked), owns_candidates, has_both_gradients(configuration))
