"""What each loss computes, once, as plain functions on tensors.

`*_forward` gives values, what a backward needs, and gradients where they can be formed already; `*_backward` gives
gradients, from formed ones or anew. The autograd.Function classes and the custom ops only connect these to their
dispatchers, and bring the function `form` that a backward calls for a new sweep.

InfoNCE and the gamma loss form their gradients in the forward when they reduce to a number: the sweep has the logits
then, and the backward only multiplies by a scalar. Formed gradients are those of the sum of unit row weights, in the
accumulation dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from math import exp
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contrastile import backends
from contrastile.pairs import (
    Backend,
    GivenWeights,
    GradNeeds,
    PairGrads,
    PairStats,
    Rows,
    SoftmaxWeights,
    WeightFunction,
)
from contrastile.statistics import (
    by_column,
    col_denominators,
    denominators,
    info_nce_values,
    normalizer_weights,
    row_denominators,
    softmax_weights,
)
from contrastile.validation import PairInputs, accumulation_dtype


class Wants(NamedTuple):
    """Whose gradients are asked for."""

    x: bool
    y: bool
    scale: bool


NOTHING = Wants(False, False, False)


def wants_of(inputs: PairInputs) -> Wants:
    """What autograd will ask for."""
    if not torch.is_grad_enabled():
        return NOTHING
    return Wants(*(t is not None and t.requires_grad for t in inputs[:3]))


class Gradients(NamedTuple):
    """With respect to x, y and scale, in the accumulation dtype; None where not asked for."""

    x: Tensor | None
    y: Tensor | None
    scale: Tensor | None

    def times(self, factor: Tensor, in_place: bool) -> Gradients:
        if not in_place:
            return Gradients(*(None if g is None else g * factor for g in self))
        if factor.device.type == "cpu" and factor.item() == 1:  # the usual case: spares a pass over them
            return self
        return Gradients(*(None if g is None else g.mul_(factor) for g in self))


class LateGradients(NamedTuple):
    """Those that wait for the upstream gradient before their last pass, which serves once."""

    rows: Rows
    wants: Wants

    def finish(self, inputs: PairInputs, upstream: Tensor | None, dtype: torch.dtype) -> Gradients:
        dx, dy, row_moment = self.rows.finish(inputs.x, upstream, dtype, joined=has_both_roles(inputs))
        return Gradients(dx, dy, scale_gradient(inputs, row_moment))


Formed = Gradients | LateGradients
Former = Callable[[GivenWeights], Formed]


class GammaTerms(NamedTuple):
    """Constants of the gamma loss."""

    log_u: Tensor  # (N,)
    log_v: Tensor | None  # (M,); None: rows only
    row_draws: Tensor | None  # (N,); None: ones
    col_draws: Tensor | None  # (M,)
    log_multiplier: float
    cap: bool


def outside_autocast(device: torch.device) -> AbstractContextManager[None]:
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)  # type: ignore[return-value]
    return nullcontext()


def pair_gradients(
    inputs: PairInputs,
    weights: GivenWeights | SoftmaxWeights,
    wants: Wants,
    backend: Backend | str,
    stats: bool = False,
    row_weight: bool = False,
) -> tuple[Formed, PairGrads]:
    """pair_grad in terms of the inputs, and its other results."""
    wants_dy = wants.x if has_both_roles(inputs) else wants.y
    needs = GradNeeds(
        wants.x, wants_dy, moment=wants.scale, row_weight=row_weight, stats=stats, positives=False, late=True
    )
    with outside_autocast(inputs.x.device):
        found = backends.get(backend).pair_grad(inputs.problem(), weights, needs)
    if found.rows is not None:
        return LateGradients(found.rows, wants), found
    dx, dy = found.dx, found.dy
    if has_both_roles(inputs) and dx is not None and dy is not None:
        dx, dy = dx.add_(dy), None
    return Gradients(dx, dy, scale_gradient(inputs, found.row_moment)), found


def has_both_roles(inputs: PairInputs) -> bool:
    """x is anchors and candidates, and a sweep finds its gradient in two parts."""
    return inputs.y is None and not inputs.self_similarity


def scale_gradient(inputs: PairInputs, row_moment: Tensor | None) -> Tensor | None:
    if row_moment is None:
        return None
    by_row = row_moment / inputs.scale.to(row_moment.dtype)
    return by_row.sum() if inputs.scale.dim() == 0 else by_row


def finished(inputs: PairInputs, formed: Formed, upstream: Tensor | None = None, in_place: bool = True) -> Gradients:
    """Times the upstream gradient. Late gradients come rounded to the inputs' dtype."""
    if isinstance(formed, LateGradients):
        return formed.finish(inputs, upstream, inputs.x.dtype)
    return formed if upstream is None else formed.times(upstream, in_place)


def complete(inputs: PairInputs, formed: Formed | None) -> Gradients | None:
    """Without an upstream gradient, in the accumulation dtype."""
    if isinstance(formed, LateGradients):
        return formed.finish(inputs, None, accumulation_dtype(inputs.x.dtype))
    return formed


def pair_statistics(inputs: PairInputs, backend: Backend | str, columns: bool) -> PairStats:
    with outside_autocast(inputs.x.device):
        return backends.get(backend).pair_stats(inputs.problem(), columns=columns)


def stats_tensors(stats: PairStats) -> tuple[Tensor | None, ...]:
    """What a backward needs of them."""
    return stats.row_max, stats.row_sum, stats.col_max, stats.col_sum, stats.positive_logit


def stats_of(tensors: Iterable[Any]) -> PairStats:
    """Undoes stats_tensors."""
    return PairStats(*tensors)


def covers(formed: Formed | None, wants: Wants) -> bool:
    if formed is None:
        return False
    given = formed.wants if isinstance(formed, LateGradients) else [g is not None for g in formed]
    return all(given for given, wanted in zip(given, wants, strict=True) if wanted)


def rounded(inputs: PairInputs, gradients: Gradients) -> tuple[Tensor | None, ...]:
    """Gradients in the inputs' own dtypes."""
    sources = (inputs.x, inputs.y, inputs.scale)
    pairs = zip(sources, gradients, strict=True)
    return tuple(None if g is None or of is None else g.to(of.dtype) for of, g in pairs)


def reduce(values: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return values
    return values.mean() if reduction == "mean" else values.sum()


def row_factor(inputs: PairInputs, reduction: str, both_directions: bool) -> float:
    """What a row's unit weight counts in the reduced loss."""
    return (1 / inputs.x.shape[0] if reduction == "mean" else 1.0) * (0.5 if both_directions else 1.0)


def row_gains(inputs: PairInputs, upstream: Tensor, reduction: str, both_directions: bool) -> Tensor:
    """Gradient of the objective in each row's unweighted loss, (N,)."""
    return (upstream * row_factor(inputs, reduction, both_directions)).expand(inputs.x.shape[0]).contiguous()


# InfoNCE, and NT-Xent where y is None


def info_nce_forward(
    inputs: PairInputs, symmetric: bool, reduction: str, wants: Wants, backend: Backend | str
) -> tuple[Tensor, PairStats, Formed | None]:
    gradients = None
    if any(wants) and reduction != "none":
        gain = row_factor(inputs, reduction, symmetric)
        gradients, found = pair_gradients(inputs, SoftmaxWeights(symmetric, gain), wants, backend, stats=True)
        stats = found.stats
        assert stats is not None
    else:
        stats = pair_statistics(inputs, backend, symmetric)
    losses = stats.row_loss
    if losses is None:
        assert inputs.positives is not None
        losses = info_nce_values(stats, inputs.positives, symmetric)
    return reduce(losses, reduction), stats, gradients


def info_nce_backward(
    inputs: PairInputs,
    stats: PairStats,
    upstream: Tensor,
    symmetric: bool,
    reduction: str,
    formed: Formed | None,
    form: Former,
    in_place: bool,
) -> Gradients:
    if formed is not None:
        return finished(inputs, formed, upstream, in_place)
    assert inputs.positives is not None
    gain = row_gains(inputs, upstream, reduction, symmetric)
    col_gain = by_column(gain, inputs.positives, gain.shape[0], 0.0) if symmetric else None
    return finished(inputs, form(softmax_weights(stats, inputs.positives, gain, col_gain, inputs.self_similarity)))


# The gamma loss


def gamma_forward(
    inputs: PairInputs, terms: GammaTerms, reduction: str, wants: Wants, backend: Backend | str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Formed | None]:
    """(loss, row_lse, col_lse, logits of the positives, gradients)."""
    with outside_autocast(inputs.x.device):
        positive = backends.get(backend).positive_logits(inputs.problem())
    forms = any(wants) and reduction != "none"
    gain = torch.full_like(positive, row_factor(inputs, reduction, terms.log_v is not None))
    weights = gamma_weights(inputs, terms, positive, gain)
    gradients, found = pair_gradients(inputs, weights, wants if forms else NOTHING, backend, stats=True)
    stats, positives = found.stats, inputs.positives
    assert stats is not None
    assert positives is not None
    assert found.row_mass is not None
    values = _gamma_bound(found.row_mass, positive, terms.log_u, terms.row_draws, terms.cap)
    multiplier = exp(terms.log_multiplier)
    row_lse = denominators(stats.row_max, stats.row_sum, positive, multiplier).log()
    col_lse = None
    if terms.log_v is not None:
        assert found.col_mass is not None
        draws = None if terms.col_draws is None else terms.col_draws[positives]
        mass = found.col_mass[positives]
        values = (values + _gamma_bound(mass, positive, terms.log_v[positives], draws, terms.cap)) / 2
        col_lse = col_denominators(stats, positives, multiplier).log()
    return reduce(values, reduction), row_lse, col_lse, positive, gradients if forms else None


def gamma_backward(
    inputs: PairInputs,
    terms: GammaTerms,
    positive_logit: Tensor,
    upstream: Tensor,
    reduction: str,
    formed: Formed | None,
    form: Former,
    in_place: bool,
) -> Gradients:
    both_directions = terms.log_v is not None
    if formed is not None:
        return finished(inputs, formed, upstream, in_place)
    gain = row_gains(inputs, upstream, reduction, both_directions)
    return finished(inputs, form(gamma_weights(inputs, terms, positive_logit, gain)))


def gamma_weights(inputs: PairInputs, terms: GammaTerms, positive: Tensor, gain: Tensor) -> GivenWeights:
    positives = inputs.positives
    assert positives is not None
    row_gain = gain if terms.row_draws is None else gain * terms.row_draws
    coeff = row_gain * _weight(positive + terms.log_u, terms.cap) - gain
    row_shift = -terms.log_u - terms.log_multiplier
    function = WeightFunction.CAPPED if terms.cap else WeightFunction.EXPONENTIAL
    if terms.log_v is None:
        return GivenWeights(row_shift, row_gain, None, None, coeff, function)
    col_gain = by_column(gain, positives, gain.shape[0], 0.0)
    if terms.col_draws is not None:
        col_gain = col_gain * terms.col_draws
    coeff = coeff + col_gain[positives] * _weight(positive + terms.log_v[positives], terms.cap) - gain
    return GivenWeights(row_shift, row_gain, -terms.log_v - terms.log_multiplier, col_gain, coeff, function)


def _gamma_bound(
    negative_mass: Tensor, positive: Tensor, log_weights: Tensor, draws: Tensor | None, cap: bool
) -> Tensor:
    t = positive + log_weights
    mass = negative_mass + (torch.where(t > 0, 1 + t, t.clamp(max=0).exp()) if cap else t.exp())
    return mass - t - 1 if draws is None else draws * mass - draws.log() - t - 1


def _weight(t: Tensor, cap: bool) -> Tensor:
    return t.clamp(max=0).exp() if cap else t.exp()


# Log-normalisers


def log_normalizers_forward(
    inputs: PairInputs, columns: bool, log_multiplier: float, backend: Backend | str
) -> tuple[Tensor, Tensor | None, PairStats]:
    stats = pair_statistics(inputs, backend, columns)
    multiplier = exp(log_multiplier)
    col_lse = col_denominators(stats, inputs.positives, multiplier).log() if columns else None
    return row_denominators(stats, multiplier).log(), col_lse, stats


def log_normalizers_backward(
    inputs: PairInputs,
    stats: PairStats,
    log_multiplier: float,
    row_gain: Tensor | None,
    col_gain: Tensor | None,
    form: Former,
) -> Gradients:
    """A gain is None where nothing depends on that direction."""
    row_gain = torch.zeros_like(stats.row_max) if row_gain is None else row_gain
    return finished(inputs, form(normalizer_weights(stats, inputs.positives, exp(log_multiplier), row_gain, col_gain)))


# Ranks


def retrieval_ranks_forward(inputs: PairInputs, backend: Backend | str) -> Tensor:
    with outside_autocast(inputs.x.device):
        ranks = backends.get(backend).pair_stats(inputs.problem(), ranks=True).row_rank
    assert ranks is not None
    return ranks
