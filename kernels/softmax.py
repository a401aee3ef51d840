"""Softmax weights and losses of rows, from the statistics of their negatives.

    reads   maximum and sum of a row and of its positive's column, and the positive's logit
    writes  shift and gain of the row and of that column, the positive's coefficient, the row's loss: 24 bytes a row
    bound   the launch: as PyTorch's operations it is some forty

contrastile/statistics.py has the formulas, for backends that have no such kernel. Neither here nor there is a small
difference of large numbers formed: a positive's coefficient is the negatives' share, a confident row's loss log1p.
"""

from __future__ import annotations

import triton
import triton.language as tl
from contrastile.kernels.tiles import finite


@triton.jit
def softmax_weights_kernel(
    row_max,  # (N,) float32, as all without another type
    row_sum,  # (N,)
    col_max,  # (N,), a permutation of the rows' positives; None: rows alone, or of one set of embeddings
    col_sum,  # (N,)
    positive_logit,  # (N,)
    positives,  # (N,) int64
    gain,  # of every row, and of every column
    weights,  # Weights, written
    losses,  # (N,), written: of the row, or the mean of it and its positive's column
    rows,
    SELF: tl.constexpr,  # the positives are rows too: a pair is met from both its ends
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_row = row < rows
    maximum, total = tl.load(row_max + row, mask=is_row, other=0.0), tl.load(row_sum + row, mask=is_row, other=1.0)
    logit = tl.load(positive_logit + row, mask=is_row, other=0.0)
    shift, weight, share = weight_of(maximum, total, logit, gain)
    tl.store(weights.row_shift + row, shift, mask=is_row)
    tl.store(weights.row_gain + row, weight, mask=is_row)
    loss = negative_log_probability(maximum, total, logit)
    coefficient = -share
    if SELF or col_max is not None:
        other = tl.load(positives + row, mask=is_row, other=0)
        if SELF:
            maximum, total = tl.load(row_max + other), tl.load(row_sum + other)
            _, _, share = weight_of(maximum, total, tl.load(positive_logit + other), gain)
        else:
            maximum, total = tl.load(col_max + other), tl.load(col_sum + other)
            shift, weight, share = weight_of(maximum, total, logit, gain)
            tl.store(weights.col_shift + other, shift, mask=is_row)
            tl.store(weights.col_gain + other, weight, mask=is_row)
            loss = (loss + negative_log_probability(maximum, total, logit)) / 2
        coefficient -= share
    tl.store(weights.positive_coeff + row, coefficient, mask=is_row)
    tl.store(losses + row, loss, mask=is_row)


@triton.jit
def weight_of(maximum, total, logit, gain):
    """(shift, gain / denominator, the negatives' share of the gain) of rows, whose denominators are in units of
    exp(shift).
    """
    shift = finite(tl.maximum(maximum, logit, propagate_nan=tl.PropagateNan.ALL))
    negative = total * tl.exp(maximum - shift)
    denominator = negative + tl.exp(logit - shift)
    weight = tl.where(denominator == 0, 0.0, gain / denominator)
    return shift, weight, weight * negative


@triton.jit
def negative_log_probability(maximum, total, logit):
    """log(1 + exp(gap)) for a gap between the negatives' log-sum-exp and the positive's logit. NaN where that is not
    finite: the loss is not defined then.
    """
    gap = maximum - logit + tl.log(total)
    below = tl.exp(-tl.abs(gap))
    return tl.where(gap > 0, gap, 0.0) + log1p(below) + 0 * logit


@triton.jit
def log1p(values):
    """log(1 + t) for t >= 0, to the last digits of a small t: what 1 + t rounds off is divided out again."""
    rounded_sum = 1 + values
    lost = rounded_sum - 1
    return tl.where(lost == 0, values, tl.log(rounded_sum) * (values / tl.where(lost == 0, 1.0, lost)))
