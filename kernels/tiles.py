"""What the tile kernels share: a tile's logits, and the pairs that are no negatives.

A launch covers a window of pairs, and a program one tile of it. Logits stay in natural units: were log2(e) folded into
the scale, logits of 1000 would lose a digit that their difference to a shift keeps.

Where PARTS of a tile's columns are asked for, the product's accumulators wait in tensor memory (tcgen05), a row a lane.
What follows the product then takes one part after another, each as a tile of its own, and so a part of the registers.

EMULATE_BF16 is for Triton's interpreter, which multiplies bfloat16 wrongly and rounds to it by cutting digits off.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETING = tl.constexpr(triton.knobs.runtime.interpret)
INFINITY = tl.constexpr(float("inf"))
SMALLEST_NORMAL = tl.constexpr(2.0**-126)
SMALLEST_SUM = tl.constexpr(2.0**-80)  # of exp(logit - shift): what a float32 then loses is below its precision
LARGEST_SUM = tl.constexpr(2.0**100)  # no exponential in it overflowed, nor will a sum of several such


@triton.jit
def tile_of_program(window, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, GROUP_ROWS: tl.constexpr):
    """(tile row, tile column) in the window. GROUP_ROWS tile rows are walked together, to reuse the L2 cache."""
    program = tl.program_id(0)
    tile_rows = tl.cdiv(window.rows, BLOCK_ROWS)
    tile_cols = tl.cdiv(window.cols, BLOCK_COLS)
    group = program // (GROUP_ROWS * tile_cols)
    place = program % (GROUP_ROWS * tile_cols)
    rows_of_group = tl.minimum(tile_rows - group * GROUP_ROWS, GROUP_ROWS)
    return group * GROUP_ROWS + place % rows_of_group, place // rows_of_group


@triton.jit
def load_rows(embeddings, stride, row, last_row, first_feature, DEPTH: tl.constexpr, BLOCK_DEPTH: tl.constexpr):
    """BLOCK_DEPTH features of each row, 0 past the last feature. A row past the last one repeats that."""
    feature = first_feature + tl.arange(0, BLOCK_DEPTH)
    start = tl.minimum(row, last_row).to(tl.int64) * stride
    pointers = embeddings + start[:, None] + feature[None, :]
    if DEPTH % BLOCK_DEPTH == 0:
        return tl.load(pointers)
    return tl.load(pointers, mask=feature[None, :] < DEPTH, other=0.0)


@triton.jit
def add_product(total, left, right, PRECISION: tl.constexpr, EMULATE_BF16: tl.constexpr):
    """total + left @ right."""
    if EMULATE_BF16:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def rounded(values, dtype: tl.constexpr, EMULATE_BF16: tl.constexpr):
    """To the nearest of a dtype that is as wide or narrower, ties to even."""
    if EMULATE_BF16 and dtype == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        values = tl.where(values == values, nearest, float("nan"))
    return values.to(dtype)


@triton.jit
def tile_products(
    pairs,
    anchor_blocks,
    candidate_blocks,
    first_row,
    first_col,
    DEPTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    """X Y^T of all pairs of a tile, (BLOCK_ROWS, BLOCK_COLS); padding holds 0 or products of the last row."""
    products = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for first_feature in tl.range(0, DEPTH, BLOCK_DEPTH):
        x = load_anchors(pairs, anchor_blocks, first_row, first_feature, DEPTH, BLOCK_ROWS, BLOCK_DEPTH)
        y = load_candidates(pairs, candidate_blocks, first_col, first_feature, DEPTH, BLOCK_COLS, BLOCK_DEPTH)
        products = add_product(products, x, y.T, PRECISION, EMULATE_BF16)
    return products


@triton.jit
def load_anchors(
    pairs,
    blocks,
    first_row,
    first_feature,
    DEPTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """By the tensor descriptor `blocks`, where there is one: 0 past the last row."""
    if blocks is not None:
        anchors = blocks.load([first_row, first_feature])
    else:  # not just what follows: Triton compiles code behind the return of such a branch
        row = first_row + tl.arange(0, BLOCK_ROWS)
        anchors = load_rows(pairs.anchors, pairs.anchor_stride, row, pairs.rows - 1, first_feature, DEPTH, BLOCK_DEPTH)
    return anchors


@triton.jit
def load_candidates(
    pairs,
    blocks,
    first_col,
    first_feature,
    DEPTH: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Likewise."""
    if blocks is not None:
        candidates = blocks.load([first_col, first_feature])
    else:
        col = first_col + tl.arange(0, BLOCK_COLS)
        candidates = load_rows(
            pairs.candidates, pairs.candidate_stride, col, pairs.cols - 1, first_feature, DEPTH, BLOCK_DEPTH
        )
    return candidates


@triton.jit
def halves(products, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Left and right half of the columns. Of accumulators in tensor memory each is loaded where it is used."""
    return tl.split(tl.permute(tl.reshape(products, (ROWS, 2, COLS // 2)), (0, 2, 1)))


@triton.jit
def scaled(products, pairs, first_row, ROWS: tl.constexpr):
    """The logits: products times the scale of their row."""
    row = first_row + tl.arange(0, ROWS)
    scale = tl.load(pairs.scale + row, mask=row < pairs.rows, other=0.0)
    return products * scale[:, None]


@triton.jit
def keep_negatives(logits, pairs, first_row, first_col, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """-inf in the place of padding, positives and masked pairs. Most tiles have no padding, no positive and no sample
    with itself, and cost no comparison for them; groups and ceilings are compared in every tile.
    """
    row = first_row + tl.arange(0, BLOCK_ROWS)
    col = first_col + tl.arange(0, BLOCK_COLS)
    has_excluded = (first_row + BLOCK_ROWS > pairs.rows) | (first_col + BLOCK_COLS > pairs.cols)
    if pairs.positives is not None:
        has_excluded |= positives_in_tile(pairs, row, first_col, BLOCK_COLS)
    if pairs.self_offset is not None:
        first_own = first_row + pairs.self_offset
        has_excluded |= (first_own < first_col + BLOCK_COLS) & (first_own + BLOCK_ROWS > first_col)
    if has_excluded:
        is_negative = (row < pairs.rows)[:, None] & (col < pairs.cols)[None, :]
        if pairs.positives is not None:
            is_negative &= col[None, :] != load_positives(pairs, row)[:, None]
        if pairs.self_offset is not None:
            is_negative &= col[None, :] != (row + pairs.self_offset)[:, None]
        logits = tl.where(is_negative, logits, -INFINITY)
    if pairs.row_groups is not None:
        row_group = tl.load(pairs.row_groups + row, mask=row < pairs.rows, other=0)
        col_group = tl.load(pairs.col_groups + col, mask=col < pairs.cols, other=0)
        logits = tl.where(row_group[:, None] != col_group[None, :], logits, -INFINITY)
    if pairs.row_ceiling is not None:
        ceiling = tl.load(pairs.row_ceiling + row, mask=row < pairs.rows, other=0.0)
        logits = tl.where(logits > ceiling[:, None], -INFINITY, logits)
    return logits


@triton.jit
def load_positives(pairs, row):
    return tl.load(pairs.positives + row, mask=row < pairs.rows, other=-1)


@triton.jit
def positives_in_tile(pairs, row, first_col, BLOCK_COLS: tl.constexpr):
    """Whether any row's positive is among the columns of the tile."""
    positive = load_positives(pairs, row)
    here = (positive >= first_col) & (positive < first_col + BLOCK_COLS)
    return tl.max(here.to(tl.int32), 0) > 0


@triton.jit
def exp(values):
    """Below the smallest normal number 0: to keep what lies there takes three instructions more."""
    if INTERPRETING:
        exponentials = tl.exp(values)
        return tl.where(exponentials < SMALLEST_NORMAL, 0.0, exponentials)
    else:
        return libdevice.fast_expf(values)


@triton.jit
def finite(maximum):
    """A maximum to subtract: that of no elements, -inf, becomes 0. +inf stays, and makes its sum NaN."""
    return tl.where(maximum == -INFINITY, 0.0, maximum)


@triton.jit
def are_exact(sums):
    """Which sums of exponentials under a common shift have lost nothing to underflow, nor overflowed, nor are NaN."""
    return (sums >= SMALLEST_SUM) & (sums <= LARGEST_SUM)


@triton.jit
def sums_are_exact(sums, valid):
    return tl.min((~valid | are_exact(sums)).to(tl.int32), 0) > 0


@triton.jit
def sums_by_own_maxima(logits, AXIS: tl.constexpr, ROW_LANES: tl.constexpr):
    """(maximum, sum of exp(logit - maximum)) over an axis, exact at any magnitude."""
    if AXIS == 1:
        maximum = tl.max(logits, 1)
        return maximum, tl.sum(exp(logits - finite(maximum)[:, None]), 1)
    else:
        maximum = over_rows(logits, True, ROW_LANES)
        return maximum, over_rows(exp(logits - finite(maximum)[None, :]), False, ROW_LANES)


@triton.jit
def over_rows(values, MAXIMUM: tl.constexpr, ROW_LANES: tl.constexpr):
    """tl.max or tl.sum of every column. ROW_LANES: how many neighbouring rows lie in as many lanes, 32 in tensor memory
    and 8 in a fragment of mma.sync or wgmma, which has the next 8 in the same lanes again. tl.sum would take log2 of
    that in shuffles for every value. Here each step halves the values as it adds: one shuffle a value, in all.
    1: as Triton does it.
    """
    if ROW_LANES == 1:
        return tl.max(values, 0) if MAXIMUM else tl.sum(values, 0)
    else:
        COLS: tl.constexpr = values.shape[1]
        if ROW_LANES == 8:
            values = tl.reshape(values, (values.shape[0] // 16, 2, 8, COLS))
            values = tl.max(values, 1) if MAXIMUM else tl.sum(values, 1)
            values = tl.reshape(values, (values.shape[0] * 8, COLS))
        for step in tl.static_range(5 if ROW_LANES == 32 else 3):
            values = half_over_rows(values, 1 << step, MAXIMUM)
        values = tl.reshape(values, (values.shape[0] // ROW_LANES, ROW_LANES, COLS // ROW_LANES))
        return tl.reshape((tl.max(values, 0) if MAXIMUM else tl.sum(values, 0)).T, (COLS,))


@triton.jit
def half_over_rows(values, STRIDE: tl.constexpr, MAXIMUM: tl.constexpr):
    """Of two rows STRIDE apart, the first takes the even columns of both, the second one the odd."""
    ROWS: tl.constexpr = values.shape[0]
    COLS: tl.constexpr = values.shape[1] // 2
    even, odd = tl.split(tl.reshape(values, (ROWS, COLS, 2)))
    is_second = ((tl.arange(0, ROWS) // STRIDE) % 2 == 1)[:, None]
    kept, given = tl.where(is_second, odd, even), tl.where(is_second, even, odd)
    bits = tl.reshape(given.to(tl.int32, bitcast=True), (ROWS // STRIDE // 2, 2, STRIDE, COLS))
    bits = tl.sum(bits, 1, keep_dims=True) - bits  # of two, the other: bits of a sum that wraps around are exact
    taken = tl.reshape(bits, (ROWS, COLS)).to(tl.float32, bitcast=True)
    return tl.maximum(kept, taken) if MAXIMUM else kept + taken


@triton.jit
def store_sums(sums, line, length, first, maximum, total, mass, weight, BLOCK: tl.constexpr):
    """Entries `first` onward of one line; what `sums` has no place for is left out."""
    at = first + tl.arange(0, BLOCK)
    place = line * length + at  # far below 2**31: windows are bounded
    if sums.max is not None:
        tl.store(sums.max + place, maximum, mask=at < length)
        tl.store(sums.sum + place, total, mask=at < length)
    if sums.mass is not None:
        tl.store(sums.mass + place, mass, mask=at < length)
    if sums.weight is not None:
        tl.store(sums.weight + place, weight, mask=at < length)
