"""O(N) algebra between the two sweeps and the losses: log-normalisers, InfoNCE values, softmax weights.

A sum of exponentials stays a pair (shift, total), worth total * exp(shift), rather than its rounded logarithm:
exp(s - shift) / total is then exact to an ulp however large the logits are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastile.pairs import GivenWeights, PairStats

SOFTPLUS_THRESHOLD = 40.0  # above it log(1 + exp(t)) is t to the last digit of float64


class Denominators(NamedTuple):
    """exp(shift) * total = positive + weighted negatives; `negative` and `positive` are the parts of total."""

    shift: Tensor
    total: Tensor
    negative: Tensor
    positive: Tensor | None

    def over(self, gain: Tensor) -> Tensor:
        """gain / total, and 0 where there is neither a positive nor a negative."""
        return (gain / self.total).masked_fill_(self.total == 0, 0)

    def log(self) -> Tensor:
        return (self.shift + self.total.log()).masked_fill_(self.total == 0, -torch.inf)


def denominators(
    negative_max: Tensor, negative_sum: Tensor, positive_logit: Tensor | None, multiplier: float = 1.0
) -> Denominators:
    """Joins the statistics of the negatives, each counted `multiplier` times, with the positive."""
    shift = negative_max if positive_logit is None else torch.maximum(negative_max, positive_logit)
    shift = finite(shift)
    negative = negative_sum * (negative_max - shift).exp_()
    if multiplier != 1:
        negative = multiplier * negative
    if positive_logit is None:
        return Denominators(shift, negative, negative, None)
    positive = (positive_logit - shift).exp_()
    return Denominators(shift, negative + positive, negative, positive)


def finite(maximum: Tensor) -> Tensor:
    """A maximum to subtract: that of no elements, -inf, becomes 0."""
    return maximum.nan_to_num(nan=torch.nan, posinf=torch.inf, neginf=0)


def by_column(by_row: Tensor, positives: Tensor, cols: int, fill: float) -> Tensor:
    """Values of the rows, moved to the columns of their positives; fill in a column that is nobody's."""
    return by_row.new_full((cols,), fill).scatter(0, positives, by_row)


def row_denominators(stats: PairStats, multiplier: float = 1.0) -> Denominators:
    return denominators(stats.row_max, stats.row_sum, stats.positive_logit, multiplier)


def col_denominators(stats: PairStats, positives: Tensor | None, multiplier: float = 1.0) -> Denominators:
    assert stats.col_max is not None
    assert stats.col_sum is not None
    positive_logit = stats.positive_logit
    if positive_logit is not None and positives is not None:
        positive_logit = by_column(positive_logit, positives, stats.col_max.shape[0], -torch.inf)
    return denominators(stats.col_max, stats.col_sum, positive_logit, multiplier)


def info_nce_values(stats: PairStats, positives: Tensor, columns: bool) -> Tensor:
    """Loss of each row, (N,); with columns, the average with the loss of its positive's column."""
    assert stats.positive_logit is not None
    rows = _negative_log_probability(stats.row_max, stats.row_sum, stats.positive_logit)
    if not columns:
        return rows
    assert stats.col_max is not None
    assert stats.col_sum is not None
    cols = _negative_log_probability(stats.col_max[positives], stats.col_sum[positives], stats.positive_logit)
    return (rows + cols) / 2


def _negative_log_probability(negative_max: Tensor, negative_sum: Tensor, positive_logit: Tensor) -> Tensor:
    # log(1 + exp(gap)): exact for a confident row, where log-sum-exp minus s_pos would cancel. What is added is 0, or
    # NaN where the positive's logit is not finite: then the loss is not defined.
    gap = negative_max - positive_logit + negative_sum.log()
    return F.softplus(gap, threshold=SOFTPLUS_THRESHOLD).add(positive_logit, alpha=0)


def softmax_weights(
    stats: PairStats,
    positives: Tensor,
    row_gain: Tensor,
    col_gain: Tensor | None = None,
    self_similarity: bool = False,
) -> GivenWeights:
    """Weights of sum_i row_gain_i (logsumexp_j s_ij - s_i,pos), plus the same over columns with col_gain.

    Logits of x against itself are symmetric: there every pair is met from both its ends, and the columns' weights
    are the rows'.
    """
    rows = row_denominators(stats)
    cols = None if col_gain is None else col_denominators(stats, positives)
    if self_similarity:
        cols, col_gain = rows, row_gain
    row_weight = rows.over(row_gain)
    positive_coeff = -row_weight * rows.negative
    if cols is None or col_gain is None:
        return GivenWeights(rows.shift, row_weight, None, None, positive_coeff)
    col_weight = cols.over(col_gain)
    positive_coeff = positive_coeff - (col_weight * cols.negative)[positives]
    return GivenWeights(rows.shift, row_weight, cols.shift, col_weight, positive_coeff)


def normalizer_weights(
    stats: PairStats, positives: Tensor | None, multiplier: float, row_gain: Tensor, col_gain: Tensor | None
) -> GivenWeights:
    """Weights of sum_i row_gain_i row_lse_i, plus sum_j col_gain_j col_lse_j with col_gain."""
    rows = row_denominators(stats, multiplier)
    row_weight = rows.over(row_gain)
    positive_coeff = None if rows.positive is None else row_weight * rows.positive
    if col_gain is None:
        return GivenWeights(rows.shift, multiplier * row_weight, None, None, positive_coeff)
    cols = col_denominators(stats, positives, multiplier)
    col_weight = cols.over(col_gain)
    if positives is not None and positive_coeff is not None and cols.positive is not None:
        positive_coeff = positive_coeff + (col_weight * cols.positive)[positives]
    return GivenWeights(rows.shift, multiplier * row_weight, cols.shift, multiplier * col_weight, positive_coeff)
