"""Coefficients C of a window of pairs into a strip, and the sums met on the way.

    C_ij = row_gain_i * f(s_ij - row_shift_i) + col_gain_j * f(s_ij - col_shift_j), the given value at positives,
    0 at masked pairs; f = exp, min(exp, 1) (capped), or the sigmoid

    reads   X and Y once per tile column and tile row, mostly from the L2 cache in the grouped order of tiles
    writes  factor * scale_i * C_ij, 2 bytes a pair (4 for float32 inputs), into a strip that two matrix products of
            the vendor's library then read; sums by row of a part and by column of a tile, 4 bytes each: shift and sum
            of exp (statistics for a normaliser that is remembered), mass = sum of phi, phi' = f (the loss' value)
    work    one product, 2 N M D flop; one exponential a pair, of sigmoids a reciprocal and a
            polynomial of nine steps more
    bound   matrix pipe for D > 128 (docs/kernels.md has the count for every target)

Both terms and all sums come from one exponential, exp(s - a) = exp(s - shift) * exp(shift - a), with a shift between
those of the tile's first row and column. That is exact while all others lie within 40 of it, no sum underflows and
no pair is capped; the sums themselves tell. Otherwise the tile takes one exponential for each term and sum. The cap
needs no comparison by pair either: where a row's exponentials add up to 1 at most, none is above 1.
Sigmoids are of one term in the losses there are, and take an exponential for each that is asked for.
"""

from __future__ import annotations

import triton
import triton.language as tl
from contrastile.kernels.tiles import (
    LARGEST_SUM,
    are_exact,
    exp,
    halves,
    keep_negatives,
    load_positives,
    over_rows,
    positives_in_tile,
    rounded,
    scaled,
    store_sums,
    sums_by_own_maxima,
    tile_of_program,
    tile_products,
)

FARTHEST_SHIFT = tl.constexpr(40.0)  # from the one of the tile


@triton.jit
def coefficients_kernel(
    pairs,  # Pairs
    anchor_blocks,  # tensor descriptor (TMA) of the anchors, or None
    candidate_blocks,  # likewise
    window,  # Window
    weights,  # Weights
    strip,  # Strip
    row_sums,  # Sums (tile columns * PARTS, window rows)
    col_sums,  # Sums (tile rows, window columns)
    FUNCTION: tl.constexpr,  # value of a WeightFunction: "exponential", "capped" or "sigmoid"
    DEPTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    ROW_LANES: tl.constexpr,  # of accumulators (tiles.over_rows)
    GROUP_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    tile_row, tile_col = tile_of_program(window, BLOCK_ROWS, BLOCK_COLS, GROUP_ROWS)
    first_row, first_col = window.first_row + tile_row * BLOCK_ROWS, window.first_col + tile_col * BLOCK_COLS
    if strip.rows is not None:
        row = first_row + tl.arange(0, BLOCK_ROWS)
        is_wanted = tl.load(strip.rows + row, mask=row < pairs.rows, other=0)
        if tl.max(is_wanted.to(tl.int32), 0) == 0:
            return

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
    store_coefficients(
        products,
        pairs,
        window,
        weights,
        strip,
        row_sums,
        col_sums,
        tile_row,
        tile_col,
        FUNCTION,
        BLOCK_ROWS,
        BLOCK_COLS,
        PARTS,
        EMULATE_BF16,
        ROW_LANES,
    )


@triton.jit
def store_coefficients(
    products,
    pairs,
    window,
    weights,
    strip,
    row_sums,
    col_sums,
    tile_row,
    part_col,
    FUNCTION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    PARTS: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
    ROW_LANES: tl.constexpr,
):
    """Into the strip, by PARTS of a tile's columns that count as tiles of their own."""
    if PARTS > 1:
        left, right = halves(products, BLOCK_ROWS, BLOCK_COLS)
        for side in tl.static_range(2):
            store_coefficients(
                left if side == 0 else right,
                pairs,
                window,
                weights,
                strip,
                row_sums,
                col_sums,
                tile_row,
                2 * part_col + side,
                FUNCTION,
                BLOCK_ROWS,
                BLOCK_COLS // 2,
                PARTS // 2,
                EMULATE_BF16,
                ROW_LANES,
            )
    else:
        row_in_window, col_in_window = tile_row * BLOCK_ROWS, part_col * BLOCK_COLS
        logits = scaled(products, pairs, window.first_row + row_in_window, BLOCK_ROWS)
        coefficients = part_coefficients(
            logits,
            pairs,
            window,
            weights,
            strip.factor,
            row_sums,
            col_sums,
            tile_row,
            part_col,
            FUNCTION,
            BLOCK_ROWS,
            BLOCK_COLS,
            ROW_LANES,
        )
        if strip.coefficients is not None:
            row_in_window += tl.arange(0, BLOCK_ROWS)
            col_in_window += tl.arange(0, BLOCK_COLS)
            is_inside = (row_in_window < window.rows)[:, None] & (col_in_window < window.cols)[None, :]
            place = row_in_window.to(tl.int64)[:, None] * strip.stride + col_in_window[None, :]
            stored = rounded(coefficients, strip.coefficients.dtype.element_ty, EMULATE_BF16)
            tl.store(strip.coefficients + place, stored, mask=is_inside)


@triton.jit
def part_coefficients(
    logits,
    pairs,
    window,
    weights,
    factor,
    row_sums,
    col_sums,
    tile_row,
    part_col,
    FUNCTION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    ROW_LANES: tl.constexpr,
):
    """factor * scale_i * C_ij of a part, 0 in padding, from the logits of all its pairs. Stores the part's sums."""
    row_in_window, col_in_window = tile_row * BLOCK_ROWS, part_col * BLOCK_COLS
    first_row, first_col = window.first_row + row_in_window, window.first_col + col_in_window
    row = first_row + tl.arange(0, BLOCK_ROWS)
    col = first_col + tl.arange(0, BLOCK_COLS)
    valid_row, valid_col = row < pairs.rows, col < pairs.cols
    logits = keep_negatives(logits, pairs, first_row, first_col, BLOCK_ROWS, BLOCK_COLS)

    row_shift, row_gain = load_term(weights.row_shift, weights.row_gain, row, valid_row)
    col_shift, col_gain = load_term(weights.col_shift, weights.col_gain, col, valid_col)
    CAP: tl.constexpr = FUNCTION == "capped"
    row_weight = row_gain  # anything of this shape: sigmoids alone store it
    if FUNCTION == "sigmoid":
        row_max, row_sum, row_mass = row_gain, row_gain, row_gain
        col_max, col_sum, col_mass = col_gain, col_gain, col_gain
        if weights.row_shift is not None:
            coefficients, row_mass = weights_and_mass(logits, row_shift, 1, FUNCTION, ROW_LANES)
            if row_sums.weight is not None:
                row_weight = along(coefficients, 1, ROW_LANES)
            coefficients *= row_gain[:, None]
        if weights.col_shift is not None:
            col_term, col_mass = weights_and_mass(logits, col_shift, 0, FUNCTION, ROW_LANES)
            col_term *= col_gain[None, :]
            coefficients = col_term if weights.row_shift is None else coefficients + col_term
        if row_sums.max is not None:
            row_max, row_sum = sums_by_own_maxima(logits, 1, ROW_LANES)
        if col_sums.max is not None:
            col_max, col_sum = sums_by_own_maxima(logits, 0, ROW_LANES)
    else:
        shift = shift_of_tile(weights, first_row, tl.minimum(first_col, pairs.cols - 1))
        exponentials = exp(logits - shift)
        row_factor = tl.where(valid_row, exp(shift - row_shift), 0.0)  # padding has no shift: it might overflow
        col_factor = tl.where(valid_col, exp(shift - col_shift), 0.0)
        row_sum, col_sum = tl.sum(exponentials, 1), over_rows(exponentials, False, ROW_LANES)
        row_mass, col_mass = row_sum * row_factor, col_sum * col_factor
        row_max, col_max = tl.zeros_like(row_sum) + shift, tl.zeros_like(col_sum) + shift
        if weights.col_shift is None:
            coefficients = exponentials * (row_gain * row_factor)[:, None]
        elif weights.row_shift is None:
            coefficients = exponentials * (col_gain * col_factor)[None, :]
        else:
            coefficients = exponentials * ((row_gain * row_factor)[:, None] + (col_gain * col_factor)[None, :])
        is_exact = all_fit(weights.row_shift, row_sums, shift, row_shift, row_sum, row_mass, valid_row, CAP)
        is_exact &= all_fit(weights.col_shift, col_sums, shift, col_shift, col_sum, col_mass, valid_col, CAP)
        if not is_exact:
            if weights.row_shift is not None:
                if CAP:
                    row_shift, row_gain = load_term(weights.row_shift, weights.row_gain, row, valid_row)
                row_weights, row_mass = weights_and_mass(logits, row_shift, 1, FUNCTION, ROW_LANES)
                coefficients = row_weights * row_gain[:, None]
            if weights.col_shift is not None:
                if CAP:  # loaded again: kept until here, they would spill
                    col_shift, col_gain = load_term(weights.col_shift, weights.col_gain, col, valid_col)
                col_weights, col_mass = weights_and_mass(logits, col_shift, 0, FUNCTION, ROW_LANES)
                col_term = col_weights * col_gain[None, :]
                coefficients = col_term if weights.row_shift is None else coefficients + col_term
            if row_sums.max is not None:
                row_max, row_sum = sums_by_own_maxima(logits, 1, ROW_LANES)
            if col_sums.max is not None:
                col_max, col_sum = sums_by_own_maxima(logits, 0, ROW_LANES)
    store_sums(row_sums, part_col, window.rows, row_in_window, row_max, row_sum, row_mass, row_weight, BLOCK_ROWS)
    store_sums(
        col_sums, tile_row, window.cols, col_in_window, col_max, col_sum, col_mass, weight=None, BLOCK=BLOCK_COLS
    )

    if pairs.positives is not None:  # noqa: SIM102, one decides at compilation and one at run time
        if positives_in_tile(pairs, row, first_col, BLOCK_COLS):
            positive_coeff = tl.load(weights.positive_coeff + row, mask=valid_row, other=0.0)
            is_positive = col[None, :] == load_positives(pairs, row)[:, None]
            coefficients = tl.where(is_positive, positive_coeff[:, None], coefficients)
    gradient_scale = tl.load(pairs.scale + row, mask=valid_row, other=0.0)
    if factor is not None:
        gradient_scale *= tl.load(factor)
    return coefficients * gradient_scale[:, None]


@triton.jit
def load_term(shift, gain, index, valid):
    """Shift and gain of one direction; gain 0 where it is absent and in padding."""
    if shift is None:
        return tl.zeros_like(index).to(tl.float32), tl.zeros_like(index).to(tl.float32)
    else:  # not just what follows: Triton compiles code behind the return of such a branch
        return tl.load(shift + index, mask=valid, other=0.0), tl.load(gain + index, mask=valid, other=0.0)


@triton.jit
def shift_of_tile(weights, first_row, first_col):
    """One number near the shifts of all rows and columns, as they mostly are near each other: no reduction finds it."""
    if weights.col_shift is None:
        shift = tl.load(weights.row_shift + first_row)
    elif weights.row_shift is None:
        shift = tl.load(weights.col_shift + first_col)
    else:
        shift = 0.5 * (tl.load(weights.row_shift + first_row) + tl.load(weights.col_shift + first_col))
    return shift


@triton.jit
def all_fit(term, sums, shift, own_shift, total, mass, valid, CAP: tl.constexpr):
    """Whether the exponentials under the tile's shift serve all rows, or all columns: one reduction for all that may
    be in the way. A NaN is. `term` and `sums`: what there is of them.
    """
    fits = valid
    if term is not None:
        fits &= tl.abs(own_shift - shift) <= FARTHEST_SHIFT
        if CAP or sums.mass is not None:
            fits &= mass <= (1.0 if CAP else LARGEST_SUM)
    if sums.max is not None:
        fits &= are_exact(total)
    if term is None and sums.max is None:
        return True
    else:
        return tl.min((~valid | fits).to(tl.int32), 0) > 0


@triton.jit
def weights_and_mass(logits, shift, AXIS: tl.constexpr, FUNCTION: tl.constexpr, ROW_LANES: tl.constexpr):
    """f(s - shift) of every pair and the sum of phi over an axis, at any magnitude. A NaN stays one."""
    above = logits - tl.expand_dims(shift, AXIS)
    if FUNCTION == "sigmoid":
        weights, masses = sigmoid_and_softplus(above)
        return weights, along(masses, AXIS, ROW_LANES)
    if FUNCTION == "capped":
        weights = exp(tl.where(above > 0, 0.0, above))
        return weights, along(weights + tl.where(above > 0, above, 0.0), AXIS, ROW_LANES)
    weights = exp(above)
    return weights, along(weights, AXIS, ROW_LANES)


@triton.jit
def sigmoid_and_softplus(values):
    """1 / (1 + exp(-t)) and log(1 + exp(t)), each within 2 units in the last place beside the exponential's error."""
    below = exp(-tl.abs(values))
    above_zero = 1 / (1 + below)
    return tl.where(values > 0, above_zero, below * above_zero), tl.where(values > 0, values, 0.0) + log1p_of_fraction(
        below
    )


@triton.jit
def log1p_of_fraction(values):
    """log(1 + t) of t from 0 to 1, within 2 units in the last place: t times a Chebyshev fit of log(1 + t) / t."""
    fit = -0.0031760570 * values + 0.0195425265
    fit = fit * values - 0.0563736109
    fit = fit * values + 0.1054362357
    fit = fit * values - 0.1526966691
    fit = fit * values + 0.1966327429
    fit = fit * values - 0.2495161593
    fit = fit * values + 0.3332971036
    fit = fit * values - 0.4999989271
    fit = fit * values + 1.0
    return fit * values


@triton.jit
def along(values, AXIS: tl.constexpr, ROW_LANES: tl.constexpr):
    """Sum over an axis."""
    if AXIS == 1:
        return tl.sum(values, 1)
    else:
        return over_rows(values, False, ROW_LANES)
