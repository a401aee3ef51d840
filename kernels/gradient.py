"""Fused gradient sweep: dX and dY of a window of pairs, whose logits and coefficients never leave the chip.

    reads   the owned side once, the other once per owned block, mostly from the L2 cache
    writes  what is added to the owned side's gradient, read and written once; to the other's, 4 D bytes for every
            column and owned block, by atomic addition; sums as in coefficients.py
    work    the product of the logits and one for each gradient that a launch computes; exponentials as in
            coefficients.py
    bound   matrix pipe, as long as a block's gradient fits into registers beside a tile of logits: D <= 128

A program owns a block of anchors, holds their gradient in registers and walks the candidates. The gradient of the
candidates comes from the same coefficients, but ends in other programs' hands: atomic additions, in an order that
differs from run to run. Where results are to repeat bit for bit, a second launch owns candidates and walks anchors
instead, at the cost of one product more.
"""

from __future__ import annotations

import triton
import triton.language as tl
from contrastile.kernels.coefficients import part_coefficients
from contrastile.kernels.tiles import add_product, load_anchors, load_candidates, rounded


@triton.jit
def gradient_kernel(
    pairs,  # Pairs
    anchor_blocks,  # tensor descriptor (TMA) of the anchors, or None
    candidate_blocks,  # likewise
    window,  # Window
    weights,  # Weights
    gradients,  # Gradients
    row_sums,  # Sums (tile columns, window rows)
    col_sums,  # Sums (tile rows, window columns)
    FUNCTION: tl.constexpr,  # value of a WeightFunction
    OWNS_CANDIDATES: tl.constexpr,  # and no anchors, whose gradient is then None
    DEPTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,  # all of DEPTH
    ROW_LANES: tl.constexpr,  # of accumulators (tiles.over_rows)
    PRECISION: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    block = tl.program_id(0)
    if OWNS_CANDIDATES:
        steps = tl.cdiv(window.rows, BLOCK_ROWS)
        first_col = window.first_col + block * BLOCK_COLS
        y = load_candidates(pairs, candidate_blocks, first_col, 0, DEPTH, BLOCK_COLS, BLOCK_DEPTH)
        owned = tl.zeros((BLOCK_COLS, BLOCK_DEPTH), tl.float32)
    else:
        steps = tl.cdiv(window.cols, BLOCK_COLS)
        first_row = window.first_row + block * BLOCK_ROWS
        x = load_anchors(pairs, anchor_blocks, first_row, 0, DEPTH, BLOCK_ROWS, BLOCK_DEPTH)
        owned = tl.zeros((BLOCK_ROWS, BLOCK_DEPTH), tl.float32)

    for step in tl.range(0, steps):
        if OWNS_CANDIDATES:
            tile_row, tile_col = step, block
            first_row = window.first_row + step * BLOCK_ROWS
            x = load_anchors(pairs, anchor_blocks, first_row, 0, DEPTH, BLOCK_ROWS, BLOCK_DEPTH)
        else:
            tile_row, tile_col = block, step
            first_col = window.first_col + step * BLOCK_COLS
            y = load_candidates(pairs, candidate_blocks, first_col, 0, DEPTH, BLOCK_COLS, BLOCK_DEPTH)
        row = first_row + tl.arange(0, BLOCK_ROWS)
        scale = tl.load(pairs.scale + row, mask=row < pairs.rows, other=0.0)  # loaded behind the product it may spill
        products = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
        logits = add_product(products, x, y.T, PRECISION, EMULATE_BF16) * scale[:, None]
        coefficients = part_coefficients(
            logits,
            pairs,
            window,
            weights,
            gradients.factor,
            row_sums,
            col_sums,
            tile_row,
            tile_col,
            FUNCTION,
            BLOCK_ROWS,
            BLOCK_COLS,
            ROW_LANES,
        )
        coefficients = rounded(coefficients, x.dtype, EMULATE_BF16)
        if OWNS_CANDIDATES:
            owned = add_product(owned, coefficients.T, x, PRECISION, EMULATE_BF16)
        else:
            owned = add_product(owned, coefficients, y, PRECISION, EMULATE_BF16)
            if gradients.candidates is not None:
                other = tl.zeros((BLOCK_COLS, BLOCK_DEPTH), tl.float32)
                other = add_product(other, coefficients.T, x, PRECISION, EMULATE_BF16)
                col = first_col + tl.arange(0, BLOCK_COLS)
                places, valid = places_of(col, pairs.cols, DEPTH, BLOCK_DEPTH)
                tl.atomic_add(gradients.candidates + places, other, mask=valid, sem="relaxed")

    if OWNS_CANDIDATES:
        col = first_col + tl.arange(0, BLOCK_COLS)
        add_owned(gradients.candidates, owned, col, pairs.cols, DEPTH, BLOCK_DEPTH)
    else:
        row = first_row + tl.arange(0, BLOCK_ROWS)
        add_owned(gradients.anchors, owned, row, pairs.rows, DEPTH, BLOCK_DEPTH)


@triton.jit
def places_of(row, rows, DEPTH: tl.constexpr, BLOCK_DEPTH: tl.constexpr):
    """Offsets of these rows of a gradient, (rows, BLOCK_DEPTH), and which of them there are."""
    feature = tl.arange(0, BLOCK_DEPTH)
    valid = (row < rows)[:, None] & (feature < DEPTH)[None, :]
    return row.to(tl.int64)[:, None] * DEPTH + feature[None, :], valid


@triton.jit
def add_owned(gradient, owned, row, rows, DEPTH: tl.constexpr, BLOCK_DEPTH: tl.constexpr):
    """Adds to rows that no other program of the launch touches."""
    places, valid = places_of(row, rows, DEPTH, BLOCK_DEPTH)
    tl.store(gradient + places, tl.load(gradient + places, mask=valid, other=0.0) + owned, mask=valid)
