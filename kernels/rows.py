"""Last pass over the rows of a gradient: its factors, its moment, and its rounding, all at once.

    reads   the sums over pairs, 4 D bytes a row; the embeddings for a moment; the sums of another role if there is one
    writes  the gradient in the dtype that it is wanted in, and its moment, 4 bytes a row
    bound   DRAM bandwidth

The gradient may take the place of the sums: every entry is read before it is written, by the same program.
"""

from __future__ import annotations

import triton
import triton.language as tl
from contrastile.kernels.tiles import rounded


@triton.jit
def finish_rows_kernel(
    sums,  # (N, D) float32, contiguous
    row_factors,  # (N,) float32 or None: ones
    other_sums,  # (N, D) float32, contiguous, or None: of the same rows as candidates, no part of the moment
    factor,  # (1,) float32 of both sums, or None: 1
    embeddings,  # (N, D) or None
    gradient,  # (N, D), contiguous, written, or None
    moments,  # (N,) float32, written, or None: dot product of every row with factor * row_factor * sums, unrounded
    row_stride,  # of embeddings, as is
    feature_stride,
    rows,
    DEPTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < rows
    start = row.to(tl.int64)[:, None]
    common_factor = 1.0 if factor is None else tl.load(factor)
    row_factor = common_factor + tl.zeros((BLOCK_ROWS,), tl.float32)
    if row_factors is not None:
        row_factor *= tl.load(row_factors + row, mask=is_row, other=0.0)
    moment = tl.zeros((BLOCK_ROWS,), tl.float32)
    for first_feature in tl.range(0, DEPTH, BLOCK_DEPTH):
        feature = (first_feature + tl.arange(0, BLOCK_DEPTH))[None, :]
        valid = is_row[:, None] & (feature < DEPTH)
        place = start * DEPTH + feature
        values = tl.load(sums + place, mask=valid, other=0.0)
        values *= row_factor[:, None]
        if moments is not None:
            x = tl.load(embeddings + start * row_stride + feature * feature_stride, mask=valid, other=0.0)
            moment += tl.sum(x.to(tl.float32) * values, 1)
        if gradient is not None:
            if other_sums is not None:
                others = tl.load(other_sums + place, mask=valid, other=0.0)
                values += others * common_factor
            tl.store(gradient + place, rounded(values, gradient.dtype.element_ty, EMULATE_BF16), mask=valid)
    if moments is not None:
        tl.store(moments + row, moment, mask=is_row)
