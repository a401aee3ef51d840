"""What the sigmoid loss computes, in the manner of formulas.py: one sweep with the weights of sigmoids.

    l_i = log(1 + exp(-t_i,pos)) + sum_neg log(1 + exp(t_ij))        t_ij = s_ij + bias

A row's mass of softplus is its loss but for the positive, its weights are the derivatives. The bias is a shift that all
logits have in common, so its gradient is the sum of all coefficients: the row sums of the weights, which the sweep has
in its hands, 4 bytes for each row and tile. A constant feature of the embeddings would give the same sum out of dX, but
at the cost of copies of both, of rows that no longer start on 16 bytes, and of one block of features more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastile import backends
from contrastile.formulas import (
    NOTHING,
    Formed,
    Former,
    Gradients,
    Wants,
    finished,
    outside_autocast,
    pair_gradients,
    reduce,
    row_factor,
    row_gains,
)
from contrastile.pairs import Backend, GivenWeights, WeightFunction
from contrastile.statistics import SOFTPLUS_THRESHOLD
from contrastile.validation import PairInputs


class SigLipKept(NamedTuple):
    """What a backward needs of its forward, beside the inputs."""

    bias: Tensor  # ()
    positive_logit: Tensor  # (N,)
    bias_slope: Tensor | None  # (N,) derivative of each row's loss in the bias, where asked for


def siglip_forward(
    inputs: PairInputs, bias: Tensor, reduction: str, wants: Wants, wants_bias: bool, backend: Backend | str
) -> tuple[Tensor, SigLipKept, Formed | None]:
    """(loss, what a backward needs, gradients)."""
    with outside_autocast(inputs.x.device):
        positive = backends.get(backend).positive_logits(inputs.problem())
    forms = any(wants) and reduction != "none"
    gain = torch.full_like(positive, row_factor(inputs, reduction, both_directions=False))
    weights = siglip_weights(bias, positive, gain)
    gradients, found = pair_gradients(inputs, weights, wants if forms else NOTHING, backend, row_weight=wants_bias)
    assert found.row_mass is not None
    at_positive = positive + bias.to(positive.dtype)
    values = found.row_mass + F.softplus(-at_positive, threshold=SOFTPLUS_THRESHOLD)
    slope = None if found.row_weight is None else found.row_weight - torch.sigmoid(-at_positive)
    return reduce(values, reduction), SigLipKept(bias, positive, slope), gradients if forms else None


def siglip_backward(
    inputs: PairInputs,
    kept: SigLipKept,
    upstream: Tensor,
    reduction: str,
    formed: Formed | None,
    form: Former | None,
    in_place: bool,
) -> tuple[Gradients, Tensor | None]:
    """Those of the inputs, and of the bias. Without `form` none but the latter is wanted."""
    gain = row_gains(inputs, upstream, reduction, both_directions=False)
    dbias = None if kept.bias_slope is None else torch.dot(gain, kept.bias_slope).to(kept.bias.dtype)
    if formed is not None:
        return finished(inputs, formed, upstream, in_place), dbias
    if form is None:
        return Gradients(None, None, None), dbias
    return finished(inputs, form(siglip_weights(kept.bias, kept.positive_logit, gain))), dbias


def siglip_weights(bias: Tensor, positive: Tensor, gain: Tensor) -> GivenWeights:
    bias = bias.to(positive.dtype)
    shift = (-bias).expand_as(positive).contiguous()
    return GivenWeights(shift, gain, None, None, -gain * torch.sigmoid(-(positive + bias)), WeightFunction.SIGMOID)
