"""Statistics sweep: sums of exponentials of S = scale * X Y^T over the negatives, by row and by column.

    reads   X and Y once per tile column and tile row, mostly from the L2 cache in the grouped order of tiles
    writes  (shift, sum) of every row of a tile, and of every column if asked: 8 bytes for BLOCK pairs and direction
    work    one product, 2 N M D flop; one exponential a pair for both directions; with ranks one comparison more
    bound   matrix pipe (docs/kernels.md has the count for every target)

One program multiplies one tile, and sums it whole or by parts (PARTS, tiles.py). Rows and columns share the largest
logit as their shift, and so share the exponentials: a row's sum is then exact unless all of the row lies far below that
largest logit. Where the smallest sum says so (or is no number), it is done again with a maximum for every row and every
column. merge.py joins the sums in a fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from contrastile.kernels.tiles import (
    exp,
    finite,
    halves,
    keep_negatives,
    over_rows,
    scaled,
    store_sums,
    sums_are_exact,
    sums_by_own_maxima,
    tile_of_program,
    tile_products,
)


@triton.jit
def statistics_kernel(
    pairs,  # Pairs
    window,  # Window
    row_sums,  # Sums (parts of tile columns, window rows)
    col_sums,  # Sums (tile rows, window columns)
    positive_logit,  # (N,) float32, read for ranks
    row_rank,  # (N,) int64, counted up by every tile; None: no ranks
    DEPTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    tile_row, tile_col = tile_of_program(window, BLOCK_ROWS, BLOCK_COLS, GROUP_ROWS)
    first_row, first_col = window.first_row + tile_row * BLOCK_ROWS, window.first_col + tile_col * BLOCK_COLS
    products = tile_products(
        pairs, first_row, first_col, DEPTH, BLOCK_ROWS, BLOCK_COLS, BLOCK_DEPTH, DESCRIPTORS, PRECISION, EMULATE_BF16
    )
    tile_statistics(
        products,
        pairs,
        window,
        row_sums,
        col_sums,
        positive_logit,
        row_rank,
        tile_row,
        tile_col,
        BLOCK_ROWS,
        BLOCK_COLS,
        PARTS,
        BY_LANE=PARTS > 1,
    )


@triton.jit
def tile_statistics(
    products,
    pairs,
    window,
    row_sums,
    col_sums,
    positive_logit,
    row_rank,
    tile_row,
    tile_col,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    PARTS: tl.constexpr,
    BY_LANE: tl.constexpr,
):
    """Stores the sums of a tile, by PARTS of its columns that count as tiles of their own."""
    if PARTS > 1:
        left, right = halves(products, BLOCK_ROWS, BLOCK_COLS)
        for side in tl.static_range(2):
            tile_statistics(
                left if side == 0 else right,
                pairs,
                window,
                row_sums,
                col_sums,
                positive_logit,
                row_rank,
                tile_row,
                2 * tile_col + side,
                BLOCK_ROWS,
                BLOCK_COLS // 2,
                PARTS // 2,
                BY_LANE,
            )
    else:
        row_in_window, col_in_window = tile_row * BLOCK_ROWS, tile_col * BLOCK_COLS
        first_row, first_col = window.first_row + row_in_window, window.first_col + col_in_window
        logits = scaled(products, pairs, first_row, BLOCK_ROWS)
        logits = keep_negatives(logits, pairs, first_row, first_col, BLOCK_ROWS, BLOCK_COLS)

        row = first_row + tl.arange(0, BLOCK_ROWS)
        col = first_col + tl.arange(0, BLOCK_COLS)
        valid_row, valid_col = row < pairs.rows, col < pairs.cols
        if row_rank is not None:
            positive = tl.load(positive_logit + row, mask=valid_row, other=0.0)
            is_above = ~(logits <= positive[:, None]) & valid_col[None, :]  # a NaN counts
            tl.atomic_add(row_rank + row, tl.sum(is_above.to(tl.int64), 1), mask=valid_row, sem="relaxed")

        shift = finite(tl.max(tl.max(logits, 1), 0))
        exponentials = exp(logits - shift)
        col_sum, row_sum = over_rows(exponentials, False, BY_LANE), tl.sum(exponentials, 1)
        row_max, col_max = tl.zeros_like(row_sum) + shift, tl.zeros_like(col_sum) + shift
        is_exact = sums_are_exact(row_sum, valid_row)
        if col_sums.max is not None:
            is_exact &= sums_are_exact(col_sum, valid_col)
        if not is_exact:
            row_max, row_sum = sums_by_own_maxima(logits, 1, BY_LANE)
            if col_sums.max is not None:
                col_max, col_sum = sums_by_own_maxima(logits, 0, BY_LANE)

        store_sums(row_sums, tile_col, window.rows, row_in_window, row_max, row_sum, None, BLOCK_ROWS)
        store_sums(col_sums, tile_row, window.cols, col_in_window, col_max, col_sum, None, BLOCK_COLS)
