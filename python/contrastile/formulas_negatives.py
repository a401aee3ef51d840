"""What negatives and positives amount to, apart from each other, in the manner of formulas.py.

    row_i = log sum_neg exp(s_ij)      col_j likewise, over the rows      positive_i = s_i,pos

A loss that is a function of these three is O(N) algebra, which autograd differentiates: the gradients in them are the
weights of one gradient sweep.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from contrastile import formulas
from contrastile.formulas import Former, Gradients
from contrastile.pairs import Backend, GivenWeights, PairStats
from contrastile.statistics import denominators
from contrastile.validation import PairInputs


class LogNegatives(NamedTuple):
    """-inf where there are no negatives. Accumulation dtype."""

    row: Tensor  # (N,)
    col: Tensor | None  # (M,)
    positive: Tensor | None  # (N,); None without positives


def log_negatives_forward(inputs: PairInputs, columns: bool, backend: Backend | str) -> tuple[LogNegatives, PairStats]:
    stats = formulas.pair_statistics(inputs, backend, columns)
    row = denominators(stats.row_max, stats.row_sum, None).log()
    col = None
    if columns:
        assert stats.col_max is not None
        assert stats.col_sum is not None
        col = denominators(stats.col_max, stats.col_sum, None).log()
    return LogNegatives(row, col, stats.positive_logit), stats


def log_negatives_backward(
    inputs: PairInputs,
    stats: PairStats,
    row_gain: Tensor | None,
    col_gain: Tensor | None,
    positive_gain: Tensor | None,
    form: Former,
) -> Gradients:
    """A gain is None where nothing depends on that result."""
    rows = denominators(stats.row_max, stats.row_sum, None)
    row_weight = rows.over(torch.zeros_like(stats.row_max) if row_gain is None else row_gain)
    coeff = positive_gain
    if coeff is None and inputs.positives is not None:
        coeff = torch.zeros_like(stats.row_max)
    if inputs.self_similarity:  # a pair is met from both its ends
        if coeff is not None and inputs.positives is not None:
            coeff = coeff + coeff[inputs.positives]
        weights = GivenWeights(rows.shift, row_weight, rows.shift, row_weight, coeff)
    elif col_gain is None:
        weights = GivenWeights(rows.shift, row_weight, None, None, coeff)
    else:
        assert stats.col_max is not None
        assert stats.col_sum is not None
        cols = denominators(stats.col_max, stats.col_sum, None)
        weights = GivenWeights(rows.shift, row_weight, cols.shift, cols.over(col_gain), coeff)
    return formulas.finished(inputs, form(weights))
