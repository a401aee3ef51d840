"""Row moments: dot product of every anchor with its gradient, sum_j C_ij s_ij.

reads   X and dX once
writes  4 bytes a row
bound   DRAM bandwidth
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_moments_kernel(
    anchors,  # (N, D)
    gradients,  # (N, D) float32, contiguous
    moments,  # (N,) float32, written
    anchor_stride,
    rows,
    DEPTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    start = row.to(tl.int64)[:, None]
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    for first_feature in tl.range(0, DEPTH, BLOCK_DEPTH):
        feature = (first_feature + tl.arange(0, BLOCK_DEPTH))[None, :]
        valid = (row < rows)[:, None] & (feature < DEPTH)
        x = tl.load(anchors + start * anchor_stride + feature, mask=valid, other=0.0).to(tl.float32)
        dx = tl.load(gradients + start * DEPTH + feature, mask=valid, other=0.0)
        total += tl.sum(x * dx, 1)
    tl.store(moments + row, total, mask=row < rows)
