"""The losses as torch.autograd.Function classes, for eager calls.

The upstream gradient multiplies formed gradients before they are rounded to the inputs' dtype, so that a gradient
scaler's factor comes before a 16-bit underflow. It does so in place, to need no second buffer of their size; hence
they serve once, and a second backward through a retained graph forms them anew from the saved statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from contrastile import formulas, formulas_negatives, formulas_prefixes, formulas_siglip
from contrastile.formulas import Formed, Former, GammaTerms, Gradients, Wants
from contrastile.formulas_prefixes import PrefixTerms
from contrastile.formulas_siglip import SigLipKept
from contrastile.validation import PairInputs

__all__ = [
    "GammaContrastiveFunction",
    "InfoNCEFunction",
    "LogNegativesFunction",
    "LogNormalizersFunction",
    "PrefixesFunction",
    "SigLipFunction",
]

INPUTS = len(PairInputs._fields)

Saved = tuple[Any, ...]  # Tensor | None each
Backward = Callable[..., tuple[Tensor | None, ...]]


def needs_no_derivative(wants: tuple[bool, ...], *tensors: Tensor | None) -> bool:
    """No gradient is wanted, and no tensor has a tangent: forward mode has to reach a Function, which then raises,
    where a forward alone would drop it.
    """
    return not any(wants) and all(t is None or forward_ad.unpack_dual(t).tangent is None for t in tensors)


def differentiable_once(backward: Backward) -> Backward:
    """Differentiating the results of this backward raises, having them does not.

    It is called with what its forward saved beside ctx and the upstream gradients: saved
    tensors may be read only once, because activation checkpointing computes them anew.
    """

    @wraps(backward)
    def guarded(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        with torch.no_grad():
            gradients = backward(ctx, saved, *upstream)
        if not torch.is_grad_enabled():
            return gradients
        sources = [t for t in (*upstream, *saved) if t is not None and t.requires_grad]
        apply: Any = _NoSecondDerivative.apply
        return tuple(None if g is None else apply(g, *sources) for g in gradients)

    return guarded


class _NoSecondDerivative(torch.autograd.Function):
    """A gradient, tied to what it depends on."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        raise RuntimeError(
            "contrastile's losses have first derivatives only; for second derivatives use the function of the "
            "same name in contrastile.reference, which is plain autograd over the dense logits"
        )


class InfoNCEFunction(torch.autograd.Function):
    """apply(*PairInputs, symmetric, reduction, backend) -> loss. Without y it is NT-Xent."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        inputs = PairInputs(*arguments[:INPUTS])
        ctx.symmetric, ctx.reduction, ctx.backend = arguments[INPUTS:]
        wants = Wants(*ctx.needs_input_grad[:3])
        loss, stats, ctx.formed = formulas.info_nce_forward(inputs, ctx.symmetric, ctx.reduction, wants, ctx.backend)
        ctx.save_for_backward(*inputs, *formulas.stats_tensors(stats))
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Saved, upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs = PairInputs(*saved[:INPUTS])
        stats = formulas.stats_of(saved[INPUTS:])
        gradients = formulas.info_nce_backward(
            inputs, stats, upstream, ctx.symmetric, ctx.reduction, _take_formed(ctx), _form(ctx, inputs), in_place=True
        )
        return _for_all_arguments(ctx, inputs, gradients)


class GammaContrastiveFunction(torch.autograd.Function):
    """apply(*PairInputs, *GammaTerms, reduction, backend) -> (loss, row_lse, col_lse or None)."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        inputs, terms = PairInputs(*arguments[:INPUTS]), GammaTerms(*arguments[INPUTS:-2])
        ctx.reduction, ctx.backend = arguments[-2:]
        wants = Wants(*ctx.needs_input_grad[:3])
        result = formulas.gamma_forward(inputs, terms, ctx.reduction, wants, ctx.backend)
        loss, row_lse, col_lse, positive_logit, ctx.formed = result
        ctx.log_multiplier, ctx.cap = terms.log_multiplier, terms.cap
        ctx.save_for_backward(*inputs, positive_logit, *terms[:4])
        ctx.mark_non_differentiable(row_lse, *([] if col_lse is None else [col_lse]))
        return loss, row_lse, col_lse

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Saved, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        inputs = PairInputs(*saved[:INPUTS])
        positive_logit, log_u, log_v, row_draws, col_draws = saved[INPUTS:]
        terms = GammaTerms(log_u, log_v, row_draws, col_draws, ctx.log_multiplier, ctx.cap)
        gradients = formulas.gamma_backward(
            inputs, terms, positive_logit, upstream, ctx.reduction, _take_formed(ctx), _form(ctx, inputs), in_place=True
        )
        return _for_all_arguments(ctx, inputs, gradients)


class SigLipFunction(torch.autograd.Function):
    """apply(*PairInputs, bias, reduction, backend) -> loss."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        inputs = PairInputs(*arguments[:INPUTS])
        bias, ctx.reduction, ctx.backend = arguments[INPUTS:]
        wants, wants_bias = Wants(*ctx.needs_input_grad[:3]), ctx.needs_input_grad[INPUTS]
        loss, kept, ctx.formed = formulas_siglip.siglip_forward(
            inputs, bias, ctx.reduction, wants, wants_bias, ctx.backend
        )
        ctx.save_for_backward(*inputs, *kept)
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Saved, upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs, kept = PairInputs(*saved[:INPUTS]), SigLipKept(*saved[INPUTS:])
        form = _form(ctx, inputs) if any(ctx.needs_input_grad[:3]) else None
        gradients, dbias = formulas_siglip.siglip_backward(
            inputs, kept, upstream, ctx.reduction, _take_formed(ctx), form, in_place=True
        )
        found = _for_all_arguments(ctx, inputs, gradients)
        return *found[:INPUTS], dbias, *found[INPUTS + 1 :]


class LogNormalizersFunction(torch.autograd.Function):
    """apply(*PairInputs, columns, log_multiplier, backend) -> (row_lse, col_lse or None)."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        inputs = PairInputs(*arguments[:INPUTS])
        columns, ctx.log_multiplier, ctx.backend = arguments[INPUTS:]
        row_lse, col_lse, stats = formulas.log_normalizers_forward(inputs, columns, ctx.log_multiplier, ctx.backend)
        ctx.save_for_backward(*inputs, *formulas.stats_tensors(stats))
        ctx.set_materialize_grads(False)
        return row_lse, col_lse

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Saved, row_gain: Tensor | None, col_gain: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = PairInputs(*saved[:INPUTS])
        stats = formulas.stats_of(saved[INPUTS:])
        gradients = formulas.log_normalizers_backward(
            inputs, stats, ctx.log_multiplier, row_gain, col_gain, _form(ctx, inputs)
        )
        return _for_all_arguments(ctx, inputs, gradients)


class LogNegativesFunction(torch.autograd.Function):
    """apply(*PairInputs, columns, backend) -> (row, col or None, positive or None) of LogNegatives."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        inputs = PairInputs(*arguments[:INPUTS])
        columns, ctx.backend = arguments[INPUTS:]
        found, stats = formulas_negatives.log_negatives_forward(inputs, columns, ctx.backend)
        ctx.save_for_backward(*inputs, *formulas.stats_tensors(stats))
        ctx.set_materialize_grads(False)
        return found.row, found.col, found.positive

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, saved: Saved, row_gain: Tensor | None, col_gain: Tensor | None, positive_gain: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        inputs = PairInputs(*saved[:INPUTS])
        stats = formulas.stats_of(saved[INPUTS:])
        gradients = formulas_negatives.log_negatives_backward(
            inputs, stats, row_gain, col_gain, positive_gain, _form(ctx, inputs)
        )
        return _for_all_arguments(ctx, inputs, gradients)


class PrefixesFunction(torch.autograd.Function):
    """apply(*PairInputs, *PrefixTerms) -> loss."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        inputs, ctx.terms = PairInputs(*arguments[:INPUTS]), PrefixTerms(*arguments[INPUTS:])
        loss, ctx.formed = formulas_prefixes.prefixes_forward(inputs, ctx.terms, Wants(*ctx.needs_input_grad[:3]))
        ctx.save_for_backward(*inputs)
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Saved, upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs, formed = PairInputs(*saved), _take_formed(ctx)
        if formed is None:
            _, formed = formulas_prefixes.prefixes_forward(inputs, ctx.terms, Wants(*ctx.needs_input_grad[:3]))
            assert formed is not None
        return _for_all_arguments(ctx, inputs, formulas.finished(inputs, formed, upstream))


def _take_formed(ctx: Any) -> Formed | None:
    formed, ctx.formed = ctx.formed, None
    return formed if formulas.covers(formed, Wants(*ctx.needs_input_grad[:3])) else None


def _form(ctx: Any, inputs: PairInputs) -> Former:
    wants = Wants(*ctx.needs_input_grad[:3])
    return lambda weights: formulas.pair_gradients(inputs, weights, wants, ctx.backend)[0]


def _for_all_arguments(ctx: Any, inputs: PairInputs, gradients: Gradients) -> tuple[Tensor | None, ...]:
    return (*formulas.rounded(inputs, gradients), *[None] * (len(ctx.needs_input_grad) - 3))
