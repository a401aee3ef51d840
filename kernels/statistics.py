"""Statistics sweep: sums of exp(S) over the negatives, by row and by column, of S_ij = scale_i <x_i, y_j>.

    reads   anchors X once per tile column, candidates Y once per tile row; mostly from the L2 cache, as tiles are
            taken in groups
    writes  (shift, sum) of every row of a part, and of every column of a tile if asked: 8 bytes each; with ranks an
            atomic addition of 8 bytes for every row of a part
    work    one product, 2 N M D flop; one exponential a pair for both directions; with ranks one comparison more
    bound   matrix pipe (docs/kernels.md has the count for every target)

Negatives are all pairs but positives, a sample with itself, pairs of one group, and logits above their row's ceiling.
Where candidates are the anchors, windows on and above the diagonal are launched alone: column sums of a window above it
are the row sums of its mirror image.

One program multiplies one tile, and sums it whole or, where it is large, part by part (tiles.py). Rows and columns of
a part share its largest logit as their shift, and so share the exponentials: a row's sum is then as good as under its
own maximum unless all of the row lies far below. Where the smallest sum says so, or is NaN (a logit of +inf would leave
nothing of the other rows), the part is summed again with a maximum for every row and every column. merge.py joins the
sums in a fixed order, and ranks are integers, so results repeat bit for bit.
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
    anchor_blocks,  # tensor descriptor (TMA) of the anchors, or None
    candidate_blocks,  # likewise
    window,  # Window
    row_sums,  # Sums (tile columns * PARTS, window rows)
    col_sums,  # Sums (tile rows, window columns); without arrays: rows alone
    positive_logit,  # (N,) float32, of each row's positive as tiles compute it; read for ranks alone
    row_rank,  # (N,) int64, 0 before: negatives above the positive, added by every tile; None: no ranks
    DEPTH: tl.constexpr,  # D
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    PARTS: tl.constexpr,  # of a tile's columns, a power of two
    ROW_LANES: tl.constexpr,  # of accumulators (over_rows)
    GROUP_ROWS: tl.constexpr,  # tile rows that are taken together, for the L2 cache
    PRECISION: tl.constexpr,  # of float32 products
    EMULATE_BF16: tl.constexpr,  # in the interpreter
):
    tile_row, tile_col = tile_of_program(window, BLOCK_ROWS, BLOCK_COLS, GROUP_ROWS)
    first_row, first_col = window.first_row + tile_row * BLOCK_ROWS, window.first_col + tile_col * BLOCK_COLS
    products = tile_products(
        pairs,
        anchor_blocks,
        candidate_blocks,
        first_row,
        first_col,
        DEPTH,
        BLOCK_ROWS,
        BLOCK_COLS,
        BLOCK_DEPTH,
        PRECISION,
        EMULATE_BF16,
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
        ROW_LANES,
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
    part_col,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    PARTS: tl.constexpr,
    ROW_LANES: tl.constexpr,
):
    """Stores the sums of a tile cut by its columns into PARTS, which then count as tiles. Unrolled when compiled."""
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
                2 * part_col + side,
                BLOCK_ROWS,
                BLOCK_COLS // 2,
                PARTS // 2,
                ROW_LANES,
            )
    else:
        part_statistics(
            products,
            pairs,
            window,
            row_sums,
            col_sums,
            positive_logit,
            row_rank,
            tile_row,
            part_col,
            BLOCK_ROWS,
            BLOCK_COLS,
            ROW_LANES,
        )


@triton.jit
def part_statistics(
    products,
    pairs,
    window,
    row_sums,
    col_sums,
    positive_logit,
    row_rank,
    tile_row,
    part_col,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    ROW_LANES: tl.constexpr,
):
    row_in_window, col_in_window = tile_row * BLOCK_ROWS, part_col * BLOCK_COLS
    first_row, first_col = window.first_row + row_in_window, window.first_col + col_in_window
    logits = scaled(products, pairs, first_row, BLOCK_ROWS)
    logits = keep_negatives(logits, pairs, first_row, first_col, BLOCK_ROWS, BLOCK_COLS)

    row = first_row + tl.arange(0, BLOCK_ROWS)
    col = first_col + tl.arange(0, BLOCK_COLS)
    valid_row, valid_col = row < pairs.rows, col < pairs.cols
    if row_rank is not None:
        own = tl.load(positive_logit + row, mask=valid_row, other=0.0)
        # A tie is not above. A logit of NaN is, and so is every column where the positive's logit is NaN.
        is_above = ~(logits <= own[:, None]) & valid_col[None, :]
        tl.atomic_add(row_rank + row, tl.sum(is_above.to(tl.int64), 1), mask=valid_row, sem="relaxed")

    shift = finite(tl.max(tl.max(logits, 1), 0))
    exponentials = exp(logits - shift)
    col_sum, row_sum = over_rows(exponentials, MAXIMUM=False, ROW_LANES=ROW_LANES), tl.sum(exponentials, 1)
    row_shift, col_shift = tl.zeros_like(row_sum) + shift, tl.zeros_like(col_sum) + shift
    # Nor does it for a row or column that has no negative here, as all rows of a part past the last column: sum 0 and
    # shift -inf are stored then.
    shift_suffices = sums_are_exact(row_sum, valid_row)
    if col_sums.max is not None:
        shift_suffices &= sums_are_exact(col_sum, valid_col)
    if not shift_suffices:
        row_shift, row_sum = sums_by_own_maxima(logits, 1, ROW_LANES)
        if col_sums.max is not None:
            col_shift, col_sum = sums_by_own_maxima(logits, 0, ROW_LANES)

    store_sums(
        row_sums, part_col, window.rows, row_in_window, row_shift, row_sum, mass=None, weight=None, BLOCK=BLOCK_ROWS
    )
    store_sums(
        col_sums, tile_row, window.cols, col_in_window, col_shift, col_sum, mass=None, weight=None, BLOCK=BLOCK_COLS
    )
