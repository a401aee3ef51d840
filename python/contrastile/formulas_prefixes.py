"""What InfoNCE over prefixes of the features computes where one sweep serves them all, in the manner of formulas.py.

    L  =  sum_k weight_k reduce( info_nce( first length_k features ) )

The backward multiplies what the forward formed; where it cannot, it runs the whole sweep anew, which finds its
statistics along the way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from contrastile.backends import cpu_prefixes
from contrastile.backends.cpu_prefixes import Prefix
from contrastile.formulas import Gradients, Wants, outside_autocast, reduce, row_factor, scale_gradient
from contrastile.pairs import GradNeeds
from contrastile.statistics import info_nce_values
from contrastile.validation import PairInputs, accumulation_dtype


class PrefixTerms(NamedTuple):
    """Constants of the loss."""

    lengths: list[int]  # ascending, distinct, the last one all features
    weights: list[float]
    normalize: bool
    symmetric: bool
    reduction: str  # "mean" or "sum"


def prefixes_forward(inputs: PairInputs, terms: PrefixTerms, wants: Wants) -> tuple[Tensor, Gradients | None]:
    """The loss and the gradients that are wanted."""
    factor = row_factor(inputs, terms.reduction, terms.symmetric)
    prefixes = [Prefix(n, weight * factor) for n, weight in zip(terms.lengths, terms.weights, strict=True)]
    needs = GradNeeds(wants.x, wants.y, moment=wants.scale)
    with outside_autocast(inputs.x.device), torch.no_grad():
        stats, found = cpu_prefixes.prefix_softmax(
            inputs.problem(), prefixes, columns=terms.symmetric, normalize=terms.normalize, needs=needs
        )
    assert inputs.positives is not None
    loss = inputs.x.new_zeros((), dtype=accumulation_dtype(inputs.x.dtype))
    for weight, of_prefix in zip(terms.weights, stats, strict=True):
        loss += weight * reduce(info_nce_values(of_prefix, inputs.positives, terms.symmetric), terms.reduction)
    if not any(wants):
        return loss, None
    return loss, Gradients(found.dx, found.dy, scale_gradient(inputs, found.row_moment))
