"""Statistics sweep: sums of exponentials of S = scale * X Y^T over the negatives, by row and by column.

    reads   X and Y once per tile column and tile row, mostly from the L2 cache in the grouped order of tiles
    writes  (shift, sum) of every row of a tile, and of every column if asked: 8 bytes for BLOCK pairs and direction
    work    one product, 2 N M D flop; one exponential a pair for both directions; with ranks one comparison more
    bound   matrix pipe (docs/kernels.md has the count for every target)

One program computes one tile. Rows and columns share its largest logit as their shift, and so share the exponentials:
a row's sum is then exact unless all of the row lies far below that largest logit. A tile where the smallest sum says
so (or is no number) does it again with a maximum for every row and every column. merge.py joins the tiles' sums in a
fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from contrastile.kernels.tiles import (
    finite,
    keep_negatives,
    store_sums,
    sums_are_exact,
    sums_by_own_maxima,
    tile_logits,
    tile_of_program,
)


@triton.jit
def statistics_kernel(
    pairs,  # Pairs
    window,  # Window
    row_sums,  # Sums (tile columns, window rows)
    col_sums,  # Sums (tile rows, window columns)
    positive_logit,  # (N,) float32, read for ranks
    row_rank,  # (N,) int64, counted up by every tile; None: no ranks
    DEPTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    tile_row, tile_col = tile_of_program(window, BLOCK_ROWS, BLOCK_COLS, GROUP_ROWS)
    row_in_window, col_in_window = tile_row * BLOCK_ROWS, tile_col * BLOCK_COLS
    first_row, first_col = window.first_row + row_in_window, window.first_col + col_in_window
    logits = tile_logits(
        pairs, first_row, first_col, DEPTH, BLOCK_ROWS, BLOCK_COLS, BLOCK_DEPTH, DESCRIPTORS, PRECISION, EMULATE_BF16
    )
    logits = keep_negatives(logits, pairs, first_row, first_col, BLOCK_ROWS, BLOCK_COLS)

    row = first_row + tl.arange(0, BLOCK_ROWS)
    col = first_col + tl.arange(0, BLOCK_COLS)
    valid_row, valid_col = row < pairs.rows, col < pairs.cols
    if row_rank is not None:
        positive = tl.load(positive_logit + row, mask=valid_row, other=0.0)
        is_above = ~(logits <= positive[:, None]) & valid_col[None, :]  # a NaN counts
        tl.atomic_add(row_rank + row, tl.sum(is_above.to(tl.int64), 1), mask=valid_row, sem="relaxed")

    shift = finite(tl.max(tl.max(logits, 1), 0))
    exponentials = tl.exp(logits - shift)
    row_sum, col_sum = tl.sum(exponentials, 1), tl.sum(exponentials, 0)
    row_max, col_max = tl.zeros_like(row_sum) + shift, tl.zeros_like(col_sum) + shift
    is_exact = sums_are_exact(row_sum, valid_row)
    if col_sums.max is not None:
        is_exact &= sums_are_exact(col_sum, valid_col)
    if not is_exact:
        row_max, row_sum = sums_by_own_maxima(logits, 1)
        if col_sums.max is not None:
            col_max, col_sum = sums_by_own_maxima(logits, 0)

    store_sums(row_sums, tile_col, window.rows, row_in_window, row_max, row_sum, None, BLOCK_ROWS)
    store_sums(col_sums, tile_row, window.cols, col_in_window, col_max, col_sum, None, BLOCK_COLS)
