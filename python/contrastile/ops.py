"""The losses as custom ops, contrastile::*, for compiled graphs. Eager calls do not pass here: dispatch costs time.

A forward op takes one flag per gradient to form, and returns what it formed, and what a backward needs, as further
outputs without gradients. Where a backward wants what its forward did not form, contrastile::pair_grad forms it from
the saved statistics. An op has a fixed number of outputs: absent ones are empty.

The last argument of a differentiable op is the release. PyTorch keeps compiled graphs on disk and finds them by the
ops' names and arguments; a graph holds the backward of the release that it was traced with, which no other forward
may meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from contrastile import formulas, formulas_negatives, formulas_prefixes, formulas_siglip
from contrastile.autograd import INPUTS, Saved, differentiable_once
from contrastile.formulas import GammaTerms, Gradients, Wants
from contrastile.formulas_prefixes import PrefixTerms
from contrastile.formulas_siglip import SigLipKept
from contrastile.pairs import GivenWeights, WeightFunction
from contrastile.validation import PairInputs, accumulation_dtype
from contrastile.version import __version__

INPUTS_SCHEMA = (
    "Tensor x, Tensor? y, Tensor scale, Tensor? positives, Tensor? row_groups, Tensor? col_groups, Tensor? row_ceiling"
)
FORM_SCHEMA = "bool form_dx, bool form_dy, bool form_dscale"
TRACED_SCHEMA = "str backend, str release"
TERMS_SCHEMA = "Tensor log_u, Tensor? log_v, Tensor? row_draws, Tensor? col_draws, float log_multiplier, bool cap"
WEIGHTS_SCHEMA = "Tensor row_shift, Tensor row_gain, Tensor? col_shift, Tensor? col_gain, Tensor? positive_coeff"
PREFIXES_SCHEMA = "int[] lengths, float[] weights, bool normalize, bool symmetric, str reduction"
TERMS = len(GammaTerms._fields)
PREFIX_TERMS = len(PrefixTerms._fields)
STATS = 5


def _op(name: str, arguments: str, outputs: int) -> Callable[[Callable[..., Any]], Any]:
    schema = f"({INPUTS_SCHEMA}, {arguments}) -> ({', '.join(['Tensor'] * outputs)})"
    return lambda function: torch.library.custom_op(f"contrastile::{name}", function, mutates_args=(), schema=schema)


def _fake_of(op: Any) -> Callable[[Callable[..., Any]], Any]:
    return lambda function: op.register_fake(function)


# (loss, dx, dy, dscale, row_max, row_sum, col_max, col_sum, positive_logit)
@_op("info_nce", f"bool symmetric, str reduction, {FORM_SCHEMA}, {TRACED_SCHEMA}", 1 + 3 + STATS)
def info_nce(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = PairInputs(*arguments[:INPUTS])
    symmetric, reduction, *form, backend, _ = arguments[INPUTS:]
    loss, stats, formed = formulas.info_nce_forward(inputs, symmetric, reduction, Wants(*form), backend)
    return loss, *_present(inputs, formulas.complete(inputs, formed)), *_present(inputs, formulas.stats_tensors(stats))


@_fake_of(info_nce)
def _fake_info_nce(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = PairInputs(*arguments[:INPUTS])
    symmetric, reduction, *form, _, _ = arguments[INPUTS:]
    return _fake_loss(inputs, reduction), *_fake_formed(inputs, form, reduction), *_fake_stats(inputs, symmetric)


def _keep_info_nce(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    ctx.symmetric, ctx.reduction, *_, ctx.backend, _ = inputs[INPUTS:]
    ctx.save_for_backward(*inputs[:INPUTS], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@differentiable_once
def _info_nce_backward(ctx: Any, saved: Saved, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    inputs, rest = PairInputs(*saved[:INPUTS]), saved[INPUTS:]
    stats = formulas.stats_of(map(_absent, rest[3:]))
    gradients = formulas.info_nce_backward(
        inputs,
        stats,
        upstream,
        ctx.symmetric,
        ctx.reduction,
        _formed(ctx, rest[:3]),
        _form(ctx, inputs),
        in_place=False,
    )
    return _for_all_arguments(ctx, inputs, gradients)


info_nce.register_autograd(_info_nce_backward, setup_context=_keep_info_nce)


# (loss, row_lse, col_lse, positive_logit, dx, dy, dscale)
@_op("gamma_contrastive", f"{TERMS_SCHEMA}, str reduction, {FORM_SCHEMA}, {TRACED_SCHEMA}", 1 + 3 + 3)
def gamma_contrastive(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, terms, (reduction, *form, backend, _) = _gamma_arguments(arguments)
    loss, *vectors, formed = formulas.gamma_forward(inputs, terms, reduction, Wants(*form), backend)
    return loss, *_present(inputs, vectors), *_present(inputs, formulas.complete(inputs, formed))


@_fake_of(gamma_contrastive)
def _fake_gamma_contrastive(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, terms, (reduction, *form, _, _) = _gamma_arguments(arguments)
    rows, cols = inputs.x.shape[0], 0 if terms.log_v is None else terms.log_v.shape[0]
    vectors = [_fake(inputs, size) for size in (rows, cols, rows)]
    return _fake_loss(inputs, reduction), *vectors, *_fake_formed(inputs, form, reduction)


def _keep_gamma_contrastive(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    _, terms, (ctx.reduction, *_, ctx.backend, _) = _gamma_arguments(inputs)
    ctx.log_multiplier, ctx.cap = terms.log_multiplier, terms.cap
    ctx.save_for_backward(*inputs[:INPUTS], *terms[:4], *output[3:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@differentiable_once
def _gamma_contrastive_backward(ctx: Any, saved: Saved, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    inputs, rest = PairInputs(*saved[:INPUTS]), saved[INPUTS:]
    log_u, log_v, row_draws, col_draws, positive_logit = rest[:5]
    terms = GammaTerms(log_u, log_v, row_draws, col_draws, ctx.log_multiplier, ctx.cap)
    formed = _formed(ctx, rest[5:])
    gradients = formulas.gamma_backward(
        inputs, terms, positive_logit, upstream, ctx.reduction, formed, _form(ctx, inputs), in_place=False
    )
    return _for_all_arguments(ctx, inputs, gradients)


gamma_contrastive.register_autograd(_gamma_contrastive_backward, setup_context=_keep_gamma_contrastive)


# (loss, positive_logit, bias_slope, dx, dy, dscale)
@_op("siglip", f"Tensor bias, str reduction, {FORM_SCHEMA}, bool form_dbias, {TRACED_SCHEMA}", 1 + 2 + 3)
def siglip(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = PairInputs(*arguments[:INPUTS])
    bias, reduction, *form, form_dbias, backend, _ = arguments[INPUTS:]
    loss, kept, formed = formulas_siglip.siglip_forward(inputs, bias, reduction, Wants(*form), form_dbias, backend)
    return loss, *_present(inputs, kept[1:]), *_present(inputs, formulas.complete(inputs, formed))


@_fake_of(siglip)
def _fake_siglip(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, rows = PairInputs(*arguments[:INPUTS]), arguments[0].shape[0]
    _, reduction, *form, form_dbias, _, _ = arguments[INPUTS:]
    vectors = _fake(inputs, rows), _fake(inputs, rows if form_dbias else 0)
    return _fake_loss(inputs, reduction), *vectors, *_fake_formed(inputs, form, reduction)


def _keep_siglip(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    bias, ctx.reduction, *_, ctx.backend, _ = inputs[INPUTS:]
    ctx.save_for_backward(*inputs[:INPUTS], bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@differentiable_once
def _siglip_backward(ctx: Any, saved: Saved, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    inputs, (bias, positive_logit, slope, *formed) = PairInputs(*saved[:INPUTS]), saved[INPUTS:]
    form = _form(ctx, inputs) if any(ctx.needs_input_grad[:3]) else None
    kept = SigLipKept(bias, positive_logit, _absent(slope))
    gradients, dbias = formulas_siglip.siglip_backward(
        inputs, kept, upstream, ctx.reduction, _formed(ctx, formed), form, in_place=False
    )
    found = _for_all_arguments(ctx, inputs, gradients)
    return *found[:INPUTS], dbias, *found[INPUTS + 1 :]


siglip.register_autograd(_siglip_backward, setup_context=_keep_siglip)


# (loss, dx, dy, dscale)
@_op("prefixes", f"{PREFIXES_SCHEMA}, {FORM_SCHEMA}, str release", 1 + 3)
def prefixes(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, terms, form = _prefix_arguments(arguments)
    loss, formed = formulas_prefixes.prefixes_forward(inputs, terms, form)
    return loss, *_present(inputs, formed)


@_fake_of(prefixes)
def _fake_prefixes(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, terms, form = _prefix_arguments(arguments)
    return _fake_loss(inputs, terms.reduction), *_fake_formed(inputs, form, terms.reduction)


def _keep_prefixes(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    _, ctx.terms, _ = _prefix_arguments(inputs)
    ctx.save_for_backward(*inputs[:INPUTS], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@differentiable_once
def _prefixes_backward(ctx: Any, saved: Saved, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    inputs, formed = PairInputs(*saved[:INPUTS]), _formed(ctx, saved[INPUTS:])
    if formed is None:
        _, *found = prefixes(*inputs, *ctx.terms, *ctx.needs_input_grad[:3], __version__)
        formed = Gradients(*map(_absent, found))
    return _for_all_arguments(ctx, inputs, formed.times(upstream, in_place=False))


prefixes.register_autograd(_prefixes_backward, setup_context=_keep_prefixes)


# (row_lse, col_lse, row_max, row_sum, col_max, col_sum, positive_logit)
@_op("log_normalizers", f"bool columns, float log_multiplier, {TRACED_SCHEMA}", 2 + STATS)
def log_normalizers(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = PairInputs(*arguments[:INPUTS])
    row_lse, col_lse, stats = formulas.log_normalizers_forward(inputs, *arguments[INPUTS:-1])
    return tuple(_present(inputs, (row_lse, col_lse, *formulas.stats_tensors(stats))))


@_fake_of(log_normalizers)
def _fake_log_normalizers(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, columns = PairInputs(*arguments[:INPUTS]), arguments[INPUTS]
    row_max, _, col_max, *_ = stats = _fake_stats(inputs, columns)
    return torch.empty_like(row_max), torch.empty_like(col_max), *stats


def _keep_log_normalizers(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    ctx.columns, ctx.log_multiplier, ctx.backend, _ = inputs[INPUTS:]
    ctx.save_for_backward(*inputs[:INPUTS], *output[2:])
    ctx.mark_non_differentiable(*output[2 if ctx.columns else 1 :])
    ctx.set_materialize_grads(False)


@differentiable_once
def _log_normalizers_backward(
    ctx: Any, saved: Saved, row_gain: Tensor | None, col_gain: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    inputs, stats = PairInputs(*saved[:INPUTS]), formulas.stats_of(map(_absent, saved[INPUTS:]))
    gradients = formulas.log_normalizers_backward(
        inputs, stats, ctx.log_multiplier, row_gain, col_gain if ctx.columns else None, _form(ctx, inputs)
    )
    return _for_all_arguments(ctx, inputs, gradients)


log_normalizers.register_autograd(_log_normalizers_backward, setup_context=_keep_log_normalizers)


# (row, col, positive_logit, row_max, row_sum, col_max, col_sum)
@_op("log_negatives", f"bool columns, {TRACED_SCHEMA}", 2 + STATS)
def log_negatives(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = PairInputs(*arguments[:INPUTS])
    found, stats = formulas_negatives.log_negatives_forward(inputs, *arguments[INPUTS:-1])
    return tuple(_present(inputs, (*found, *formulas.stats_tensors(stats)[:-1])))


@_fake_of(log_negatives)
def _fake_log_negatives(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, columns = PairInputs(*arguments[:INPUTS]), arguments[INPUTS]
    row_max, _, col_max, _, positive = stats = _fake_stats(inputs, columns)
    return torch.empty_like(row_max), torch.empty_like(col_max), positive, *stats[:-1]


def _keep_log_negatives(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    ctx.columns, ctx.backend, _ = inputs[INPUTS:]
    ctx.with_positives = PairInputs(*inputs[:INPUTS]).positives is not None
    ctx.save_for_backward(*inputs[:INPUTS], *output[3:], output[2])
    absent = [*([] if ctx.columns else [output[1]]), *([] if ctx.with_positives else [output[2]])]
    ctx.mark_non_differentiable(*absent, *output[3:])
    ctx.set_materialize_grads(False)


@differentiable_once
def _log_negatives_backward(
    ctx: Any,
    saved: Saved,
    row_gain: Tensor | None,
    col_gain: Tensor | None,
    positive_gain: Tensor | None,
    *_: Any,
) -> tuple[Tensor | None, ...]:
    inputs, stats = PairInputs(*saved[:INPUTS]), formulas.stats_of(map(_absent, saved[INPUTS:]))
    col_gain, positive_gain = col_gain if ctx.columns else None, positive_gain if ctx.with_positives else None
    gradients = formulas_negatives.log_negatives_backward(
        inputs, stats, row_gain, col_gain, positive_gain, _form(ctx, inputs)
    )
    return _for_all_arguments(ctx, inputs, gradients)


log_negatives.register_autograd(_log_negatives_backward, setup_context=_keep_log_negatives)


@_op("retrieval_ranks", "str backend", 1)
def retrieval_ranks(*arguments: Any) -> Tensor:
    return formulas.retrieval_ranks_forward(PairInputs(*arguments[:INPUTS]), arguments[INPUTS])


@_fake_of(retrieval_ranks)
def _fake_retrieval_ranks(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.int64)


# (dx, dy, dscale)
@_op("pair_grad", f"{WEIGHTS_SCHEMA}, str function, {FORM_SCHEMA}, str backend", 3)
def pair_grad(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = PairInputs(*arguments[:INPUTS])
    *vectors, function, form_dx, form_dy, form_dscale, backend = arguments[INPUTS:]
    described = (*vectors, WeightFunction(function))
    weights, wants = GivenWeights(*described), Wants(form_dx, form_dy, form_dscale)
    formed, _ = formulas.pair_gradients(inputs, weights, wants, backend)
    return tuple(_present(inputs, formulas.complete(inputs, formed)))


@_fake_of(pair_grad)
def _fake_pair_grad(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(_fake_formed(PairInputs(*arguments[:INPUTS]), arguments[-4:-1], "sum"))


def _form(ctx: Any, inputs: PairInputs) -> formulas.Former:
    def form(weights: GivenWeights) -> Gradients:
        vectors = (weights.row_shift, weights.row_gain, weights.col_shift, weights.col_gain, weights.positive_coeff)
        outputs = pair_grad(*inputs, *vectors, weights.function.value, *ctx.needs_input_grad[:3], ctx.backend)
        return Gradients(*map(_absent, outputs))

    return form


def _formed(ctx: Any, tensors: Sequence[Tensor]) -> Gradients | None:
    formed = Gradients(*map(_absent, tensors))
    return formed if formulas.covers(formed, Wants(*ctx.needs_input_grad[:3])) else None


def _for_all_arguments(ctx: Any, inputs: PairInputs, gradients: Gradients) -> tuple[Tensor | None, ...]:
    return (*formulas.rounded(inputs, gradients), *[None] * (len(ctx.needs_input_grad) - 3))


def _gamma_arguments(arguments: Sequence[Any]) -> tuple[PairInputs, GammaTerms, Sequence[Any]]:
    terms = GammaTerms(*arguments[INPUTS : INPUTS + TERMS])
    return PairInputs(*arguments[:INPUTS]), terms, arguments[INPUTS + TERMS :]


def _prefix_arguments(arguments: Sequence[Any]) -> tuple[PairInputs, PrefixTerms, Wants]:
    terms, form = arguments[INPUTS : INPUTS + PREFIX_TERMS], arguments[INPUTS + PREFIX_TERMS : -1]
    return PairInputs(*arguments[:INPUTS]), PrefixTerms(*terms), Wants(*form)


def _present(inputs: PairInputs, tensors: Sequence[Tensor | None] | None) -> list[Tensor]:
    return [_fake(inputs, 0) if t is None else t for t in tensors or (None, None, None)]


def _absent(tensor: Tensor) -> Tensor | None:
    return None if tensor.dim() == 1 and tensor.shape[0] == 0 else tensor


def _fake(inputs: PairInputs, *shape: int) -> Tensor:
    return inputs.x.new_empty(shape, dtype=accumulation_dtype(inputs.x.dtype))


def _fake_loss(inputs: PairInputs, reduction: str) -> Tensor:
    return _fake(inputs, inputs.x.shape[0]) if reduction == "none" else _fake(inputs)


def _fake_formed(inputs: PairInputs, form: Sequence[bool], reduction: str) -> list[Tensor]:
    pairs = zip((inputs.x, inputs.y, inputs.scale), form, strict=True)
    shapes = [of.shape if of is not None and wanted and reduction != "none" else (0,) for of, wanted in pairs]
    return [_fake(inputs, *shape) for shape in shapes]


def _fake_stats(inputs: PairInputs, columns: bool) -> list[Tensor]:
    rows, cols = inputs.x.shape[0], inputs.x.shape[0] if inputs.y is None else inputs.y.shape[0]
    sizes = (rows, rows, cols if columns else 0, cols if columns else 0, 0 if inputs.positives is None else rows)
    return [_fake(inputs, size) for size in sizes]
