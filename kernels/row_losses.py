"""Losses of each row by itself, and their gradients: distance to a Brownian bridge's mean, squared dot products.

    reads   every input once: a program holds whole rows
    writes  4 bytes a row, and every gradient that is wanted once, in the inputs' dtype
    bound   DRAM bandwidth

    bridge        |a - m / |m||^2, m = time v + (1 - time) t; |a|^2 where m is 0
    dot products  <x1, y1>^2 + <x2, y2>^2, or (<x1, y1> - <x2, y2>)^2 (DIFFERENCE)

Gradients are those of sum_j gain_j value_j.
"""

from __future__ import annotations

import triton
import triton.language as tl
from contrastile.kernels.tiles import SMALLEST_NORMAL, rounded


@triton.jit
def bridge_rows_kernel(
    inputs,  # a, v, t: (N, D) each, unit stride along D
    strides,  # of the rows of each
    time,  # (N,) float32
    gain,  # (N,) float32
    values,  # (N,) float32, written
    gradients,  # of each input, (N, D), contiguous, written; None: not wanted
    rows,
    DEPTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < rows
    a = _load(inputs[0], strides[0], row, is_row, DEPTH, BLOCK_DEPTH)
    v = _load(inputs[1], strides[1], row, is_row, DEPTH, BLOCK_DEPTH)
    t = _load(inputs[2], strides[2], row, is_row, DEPTH, BLOCK_DEPTH)
    time_of_row = tl.load(time + row, mask=is_row, other=0.0)[:, None]
    mean = time_of_row * v + (1 - time_of_row) * t
    square = tl.sum(mean * mean, 1)[:, None]
    is_nothing = square < SMALLEST_NORMAL  # what is below it a GPU takes for 0, and 1 / 0 would follow
    inverse = tl.where(is_nothing, 0.0, 1 / tl.sqrt(tl.where(is_nothing, 1.0, square)))
    direction = mean * inverse
    residual = a - direction
    tl.store(values + row, tl.sum(residual * residual, 1), mask=is_row)
    factor = 2 * tl.load(gain + row, mask=is_row, other=0.0)[:, None]
    _store(gradients[0], factor * residual, row, is_row, DEPTH, BLOCK_DEPTH, EMULATE_BF16)
    along = tl.sum(residual * direction, 1)[:, None]
    d_mean = (residual - direction * along) * (-factor * inverse)
    _store(gradients[1], time_of_row * d_mean, row, is_row, DEPTH, BLOCK_DEPTH, EMULATE_BF16)
    _store(gradients[2], (1 - time_of_row) * d_mean, row, is_row, DEPTH, BLOCK_DEPTH, EMULATE_BF16)


@triton.jit
def dot_product_rows_kernel(
    inputs,  # x1, y1, x2, y2, as above
    strides,
    gain,
    values,
    gradients,
    rows,
    DIFFERENCE: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < rows
    x1 = _load(inputs[0], strides[0], row, is_row, DEPTH, BLOCK_DEPTH)
    y1 = _load(inputs[1], strides[1], row, is_row, DEPTH, BLOCK_DEPTH)
    x2 = _load(inputs[2], strides[2], row, is_row, DEPTH, BLOCK_DEPTH)
    y2 = _load(inputs[3], strides[3], row, is_row, DEPTH, BLOCK_DEPTH)
    first, second = tl.sum(x1 * y1, 1), tl.sum(x2 * y2, 1)
    if DIFFERENCE:
        first, second = first - second, second - first
        value = first * first
    else:
        value = first * first + second * second
    tl.store(values + row, value, mask=is_row)
    factor = 2 * tl.load(gain + row, mask=is_row, other=0.0)
    first, second = (factor * first)[:, None], (factor * second)[:, None]
    _store(gradients[0], first * y1, row, is_row, DEPTH, BLOCK_DEPTH, EMULATE_BF16)
    _store(gradients[1], first * x1, row, is_row, DEPTH, BLOCK_DEPTH, EMULATE_BF16)
    _store(gradients[2], second * y2, row, is_row, DEPTH, BLOCK_DEPTH, EMULATE_BF16)
    _store(gradients[3], second * x2, row, is_row, DEPTH, BLOCK_DEPTH, EMULATE_BF16)


@triton.jit
def _load(source, stride, row, is_row, DEPTH: tl.constexpr, BLOCK_DEPTH: tl.constexpr):
    """Rows in float32, 0 past the last row and feature."""
    feature = tl.arange(0, BLOCK_DEPTH)[None, :]
    valid = is_row[:, None] & (feature < DEPTH)
    return tl.load(source + row.to(tl.int64)[:, None] * stride + feature, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _store(gradient, formed, row, is_row, DEPTH: tl.constexpr, BLOCK_DEPTH: tl.constexpr, EMULATE_BF16: tl.constexpr):
    if gradient is not None:
        feature = tl.arange(0, BLOCK_DEPTH)[None, :]
        valid = is_row[:, None] & (feature < DEPTH)
        place = gradient + row.to(tl.int64)[:, None] * DEPTH + feature
        tl.store(place, rounded(formed, gradient.dtype.element_ty, EMULATE_BF16), mask=valid)
