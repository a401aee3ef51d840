"""Logits of the positives, as the tiles of the sweeps compute them.

    reads   anchors once, the candidate of each positive once
    writes  4 bytes a row
    work    a BLOCK x BLOCK product for its diagonal alone: BLOCK / M of a sweep
    bound   DRAM bandwidth

A dot product summed in another order would differ from a tile's logit in the last bit, and a duplicate of the positive
would then rank above or below it by chance. Hence the same products, of which only the diagonal is kept.
"""

from __future__ import annotations

import triton
import triton.language as tl
from contrastile.kernels.tiles import add_product, load_positives, load_rows


@triton.jit
def positives_kernel(
    pairs,  # Pairs, embeddings as pointers
    positive_logit,  # (N,) float32, written
    DEPTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    ROWS: tl.constexpr = BLOCK_ROWS if BLOCK_ROWS < BLOCK_COLS else BLOCK_COLS  # rows with a place on the diagonal
    first_row = tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, BLOCK_ROWS)
    last_row, last_col = pairs.rows - 1, pairs.cols - 1
    positive = load_positives(pairs, first_row + tl.arange(0, BLOCK_COLS))
    positive = tl.maximum(positive, 0)  # padding
    products = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for first_feature in tl.range(0, DEPTH, BLOCK_DEPTH):
        x = load_rows(pairs.anchors, pairs.anchor_stride, row, last_row, first_feature, DEPTH, BLOCK_DEPTH)
        y = load_rows(pairs.candidates, pairs.candidate_stride, positive, last_col, first_feature, DEPTH, BLOCK_DEPTH)
        products = add_product(products, x, y.T, PRECISION, EMULATE_BF16)
    place = tl.arange(0, BLOCK_ROWS)
    is_diagonal = place[:, None] == tl.arange(0, BLOCK_COLS)[None, :]
    product = tl.sum(tl.where(is_diagonal, products, 0.0), 1)
    kept = (place < ROWS) & (row < pairs.rows)
    scale = tl.load(pairs.scale + row, mask=kept, other=0.0)
    tl.store(positive_logit + row, product * scale, mask=kept)
