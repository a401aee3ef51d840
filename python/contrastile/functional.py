"""The losses as functions: checks, the choice of a backend, and the way into autograd or a compiled graph."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from contrastile import autograd, backends, formulas, objectives
from contrastile.distributed import Group
from contrastile.distributed import losses as shared_losses
from contrastile.formulas import NOTHING, GammaTerms, wants_of
from contrastile.negatives import Place
from contrastile.softmax_terms import Options
from contrastile.validation import (
    Groups,
    PairInputs,
    check_log_multiplier,
    check_pairs,
    check_reduction,
    check_vector,
    check_views,
)
from contrastile.version import __version__

__all__ = ["GammaOutput", "gamma_contrastive", "info_nce", "log_normalizers", "nt_xent"]


class GammaOutput(NamedTuple):
    """Loss and log-normalisers of `gamma_contrastive`. The log-normalisers carry no gradient."""

    loss: Tensor  # (), or (N,) for reduction="none"
    row_lse: Tensor  # (N,)
    col_lse: Tensor | None  # (M,); None without log_v


def info_nce(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    *,
    symmetric: bool = True,
    positives: Tensor | None = None,
    groups: Groups | None = None,
    hard_negatives: Tensor | None = None,
    label_smoothing: float = 0.0,
    prior: float | Tensor | None = None,
    false_negative_margin: float | None = None,
    reduction: str = "mean",
    group: Group | None = None,
    exchange: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """InfoNCE over all pairs of a batch, without the N x M matrix.

        l_i = log( exp(s_i,pos) + sum_neg exp(s_ij) ) - s_i,pos      (van den Oord et al. 2018, eq. 4)
        s_ij = scale_i <x_i, y_j>

    symmetric=True averages it with the same loss over columns, as CLIP does (Radford et al. 2021, figure 3):
    info_nce(x, y, s) equals (cross_entropy(s x y^T) + cross_entropy(s y x^T)) / 2.

    Sums are accumulated in float32, in float64 for float64 inputs. Where a gradient is wanted and the loss is a
    number, it is formed along with the loss. Second derivatives: `contrastile.reference.info_nce`.

    Args:
        x: anchors, (N, D), float16, bfloat16, float32 or float64, used as they are: not normalised.
        y: candidates, (M, D), dtype and device of x; under autocast the narrower of two dtypes is widened.
        scale: 1 / temperature (20.0 for a temperature of 0.05), above 0: a number, a tensor () or one (N,) per row.
            Tensors get a gradient.
        symmetric: both directions; needs N == M.
        positives: (N,) integers, the column of each row's positive, default arange(N); distinct if symmetric.
        groups: (row_ids (N,), col_ids (M,)), integers: a pair of equal ids other than the positive is no negative.
        hard_negatives: further candidates of the rows, in the dtype of x: (N, K, D), K of each row's own, or (L, D),
            shared by all rows; no group masks them, and the softmax over columns does not meet them. They get a
            gradient. (N, K, D) in 16 bits is widened to float32 as a whole. sentence-transformers' own
            MultipleNegativesRankingLoss pools the negatives n of all rows and has one direction:
            info_nce(q, torch.cat([p, n]), 20.0, symmetric=False).
        label_smoothing: from 0 to 1: that much of each target is spread evenly over a row's candidates that are not
            masked, the positive among them, as in torch's cross_entropy.
        prior: tau, a number or a tensor () or (N,), a constant without gradient, from 0 to below 1: the chance that a
            negative is of its row's class, which the sum over negatives is corrected for (Chuang et al. 2020,
            debiased); rows are meant to be of unit length.
        false_negative_margin: a negative, a hard one too, whose <x_i, y_j> is above that of the row's positive by more
            than this is masked, as one that may be a positive in truth (Zhang et al. 2025: 0.1); over columns those
            above the column's positive. A number, below 0 too. The mask is a constant: it has no gradient. Not with
            label_smoothing or prior, and with symmetric one scale for all rows.
        reduction: "mean" or "sum" over rows, or "none".
        group: process group of torch.distributed whose processes hold the rows of a larger batch: x and y are this
            process's share, of any number of rows, 0 too; positives are columns of its own y, and ids in groups are
            compared across processes. The loss is that of the whole batch in every process ("none": of own rows).
            Its gradient is that of the sum of all processes' losses in own rows and scale, so that the average of
            DistributedDataParallel is the batch's. Every process makes the same calls; with "none", of backward too.
        exchange: "gather" or "ring", how the shares meet; default by size. docs/distributed.md says what each costs.
        backend: name of a backend instead of the automatic choice.

    Returns:
        The loss, () or (N,), float32, or float64 for float64 inputs. A row without negatives has loss 0.
        NaN in x or y gives NaN in every row that meets it.

    Raises:
        ValueError: a shape, a device or a value does not fit, e.g. x is (9, 5) but y is (9, 4); with a group, also
            in every process where what must be equal differs, such as the feature dimension.
        TypeError: a dtype does not fit.
        RuntimeError: the named backend cannot run; arguments were refused in another process of the group; an
            exchange failed or timed out.
    """
    options = Options(hard_negatives, label_smoothing, prior, false_negative_margin)
    if options.given:
        return objectives.info_nce(
            x,
            y,
            scale,
            options,
            place_of(group, exchange, backend),
            symmetric=symmetric,
            positives=positives,
            groups=groups,
            reduction=reduction,
        )
    if group is not None:
        shared = shared_losses.share(
            "info_nce",
            lambda: (
                check_pairs(x, y, scale, positives, groups, both_directions=symmetric, may_be_empty=True),
                None,
            ),
            group,
            exchange,
            backend,
            reduction=reduction,
            symmetric=symmetric,
        )
        return shared_losses.info_nce(shared, symmetric, reduction)
    check_alone(exchange)
    check_reduction(reduction)
    inputs = check_pairs(x, y, scale, positives, groups, both_directions=symmetric)
    return _info_nce(inputs, symmetric, reduction, backend)


def nt_xent(
    z: Tensor,
    scale: float | Tensor,
    *,
    positives: Tensor | None = None,
    hard_negatives: Tensor | None = None,
    label_smoothing: float = 0.0,
    prior: float | Tensor | None = None,
    false_negative_margin: float | None = None,
    reduction: str = "mean",
    group: Group | None = None,
    exchange: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """NT-Xent over two views of each sample, without the 2B x 2B matrix (Chen et al. 2020, eq. 1).

        l_i = log sum_{j != i} exp(s_ij) - s_i,pos       s_ij = scale_i <z_i, z_j>

    Args:
        z: embeddings of both views, (2B, D), float16, bfloat16, float32 or float64, used as they are: `NTXentLoss`
            normalises, this does not.
        scale: 1 / temperature (20.0 for a temperature of 0.05), above 0: a number, a tensor () or one (2B,) per row.
            Tensors get a gradient. One scale for all rows makes the logits symmetric and costs half of what scales by
            row do.
        positives: (2B,) integers, the other view of each row, default (i + B) mod 2B: nobody's own, and
            positives[positives[i]] == i. With a group, both views of a sample are in one process.
        hard_negatives, label_smoothing, prior, false_negative_margin, reduction, group, exchange, backend: as for
            `info_nce`.

    Returns:
        The loss, () or (2B,), float32, or float64 for float64 inputs. NaN in z gives NaN in every row.

    Raises:
        ValueError: a shape, a device or a value does not fit, e.g. z is (9, 5): an odd number of rows.
        TypeError: a dtype does not fit.
        RuntimeError: the named backend cannot run.
    """
    options = Options(hard_negatives, label_smoothing, prior, false_negative_margin)
    if options.given:
        place = place_of(group, exchange, backend)
        return objectives.nt_xent(z, scale, options, place, positives=positives, reduction=reduction)
    if group is not None:
        shared = shared_losses.share(
            "nt_xent",
            lambda: (check_views(z, scale, positives, may_be_empty=True), None),
            group,
            exchange,
            backend,
            reduction=reduction,
        )
        return shared_losses.info_nce(shared, False, reduction)
    check_alone(exchange)
    check_reduction(reduction)
    return _info_nce(check_views(z, scale, positives), False, reduction, backend)


def log_normalizers(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    *,
    positives: Tensor | None = None,
    groups: Groups | None = None,
    columns: bool = True,
    log_multiplier: float = 0.0,
    group: Group | None = None,
    exchange: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-sum-exp of every row and column of the logits, without the N x M matrix.

        row_lse_i = log( exp(s_i,pos) + e^log_multiplier * sum_neg exp(s_ij) )       s_ij = scale_i <x_i, y_j>

    The multiplier lets the negatives of a batch stand for those of a larger set [derived]. Differentiable once.

    Args:
        x: anchors, (N, D). y: candidates, (M, D). scale: as for `info_nce`.
        positives: (N,) integers, the column of each row's positive, distinct if columns; without them no pair is
            a positive, and every pair that groups do not mask is a negative.
        groups: as for `info_nce`.
        columns: the column log-sum-exps as well.
        log_multiplier: a number of at most 40 in magnitude.
        group, exchange, backend: as for `info_nce`; every process calls backward too.

    Returns:
        row_lse (N,) and col_lse (M,) or None, float32, or float64 for float64 inputs; -inf where nothing is summed.

    Raises:
        ValueError, TypeError, RuntimeError: as `info_nce` does.
    """
    if group is not None:
        shared = shared_losses.share(
            "log_normalizers",
            lambda: (
                check_pairs(
                    x,
                    y,
                    scale,
                    positives,
                    groups,
                    both_directions=columns,
                    needs_positives=False,
                    may_be_empty=True,
                ),
                None,
            ),
            group,
            exchange,
            backend,
            log_multiplier=log_multiplier,
            columns=columns,
        )
        return shared_losses.log_normalizers(shared, columns, log_multiplier)
    check_alone(exchange)
    log_multiplier = check_log_multiplier(log_multiplier)
    inputs = check_pairs(x, y, scale, positives, groups, both_directions=columns, needs_positives=False)
    name = backends.resolve(backend, inputs.x.device.type, inputs.x.dtype)
    if torch.compiler.is_compiling():
        row_lse, col_lse, *_ = torch.ops.contrastile.log_normalizers(
            *inputs, columns, log_multiplier, name, __version__
        )
        return row_lse, col_lse if columns else None
    if autograd.needs_no_derivative(wants_of(inputs), *inputs[:3]):
        return formulas.log_normalizers_forward(inputs, columns, log_multiplier, name)[:2]
    apply: Any = autograd.LogNormalizersFunction.apply
    row_lse, col_lse = apply(*inputs, columns, log_multiplier, name)
    return row_lse, col_lse


def gamma_contrastive(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    log_u: Tensor,
    log_v: Tensor | None = None,
    *,
    positives: Tensor | None = None,
    groups: Groups | None = None,
    log_multiplier: float = 0.0,
    cap: bool = True,
    row_draws: Tensor | None = None,
    col_draws: Tensor | None = None,
    reduction: str = "mean",
    group: Group | None = None,
    exchange: str | None = None,
    backend: str | None = None,
) -> GammaOutput:
    """Decomposable contrastive loss under given log-weights: one sweep over the pairs, an upper bound of InfoNCE.

        L_i = -s_pos + g_i ( sum_neg phi(s_ij + log_u_i + log_multiplier) + phi(s_pos + log_u_i) )
              - log g_i - log_u_i - 1                               s_ij = scale_i <x_i, y_j>

    phi(t) = exp(t), or with the cap exp(t) for t <= 0 and 1 + t above. With g = 1 and log_multiplier = 0, L_i is at
    least InfoNCE's l_i for every log_u_i, with equality at log_u_i = -row_lse_i; the capped bound is the tighter one.
    After the gamma augmentation of Chen et al., "Why do we need large batchsizes in contrastive learning?",
    NeurIPS 2022; the bound, the cap and the multiplier are derived here.

    With log_v the loss of row i is the average of L_i and of the same over rows for column positives[i].
    Weights and draws are constants: they get no gradient.

    Args:
        x: anchors, (N, D). y: candidates, (M, D). scale, positives, groups, reduction, group, exchange, backend: as
            for `info_nce`. With a group log_u, log_v and the draws are those of own rows and columns.
        log_u: log-weights of the rows, (N,), floating point: minus an estimate of the row's log-normaliser.
        log_v: log-weights of the columns, (M,); needs N == M and distinct positives.
        log_multiplier: a number of at most 40 in magnitude; each negative counts e^log_multiplier times.
        cap: holds every weight exp(s_ij + log_u_i + ...) at 1 at most, so that stale log-weights cannot overflow.
        row_draws: g above, (N,), above 0, e.g. gamma draws of mean one; default ones. They multiply after the cap.
        col_draws: the same for the columns, (M,); needs log_v.

    Returns:
        GammaOutput(loss, row_lse, col_lse): the log-normalisers are those of `log_normalizers` with the same
        arguments, from the same sweep.

    Raises:
        ValueError, TypeError, RuntimeError: as `info_nce` does.
    """

    def checked(may_be_empty: bool) -> tuple[PairInputs, GammaTerms]:
        inputs = check_pairs(
            x, y, scale, positives, groups, both_directions=log_v is not None, may_be_empty=may_be_empty
        )
        if col_draws is not None and log_v is None:
            raise ValueError("col_draws is given without log_v: there is no loss over columns to draw for")
        rows, cols, like = x.shape[0], y.shape[0], inputs.x
        return inputs, GammaTerms(
            log_u=check_vector("log_u", log_u, rows, like),
            log_v=None if log_v is None else check_vector("log_v", log_v, cols, like),
            row_draws=None if row_draws is None else check_vector("row_draws", row_draws, rows, like, positive=True),
            col_draws=None if col_draws is None else check_vector("col_draws", col_draws, cols, like, positive=True),
            log_multiplier=check_log_multiplier(log_multiplier),
            cap=cap,
        )

    if group is not None:
        shared = shared_losses.share(
            "gamma_contrastive",
            lambda: checked(may_be_empty=True),
            group,
            exchange,
            backend,
            reduction=reduction,
            log_multiplier=log_multiplier,
            columns=log_v is not None,
            cap=cap,
        )
        return GammaOutput(*shared_losses.gamma_contrastive(shared, reduction))
    check_alone(exchange)
    check_reduction(reduction)
    inputs, terms = checked(may_be_empty=False)
    name = backends.resolve(backend, inputs.x.device.type, inputs.x.dtype)
    wants = wants_of(inputs)
    if torch.compiler.is_compiling():
        loss, row_lse, col_lse, *_ = torch.ops.contrastile.gamma_contrastive(
            *inputs, *terms, reduction, *wants, name, __version__
        )
        return GammaOutput(loss, row_lse, col_lse if log_v is not None else None)
    if autograd.needs_no_derivative(wants, *inputs[:3]):
        return GammaOutput(*formulas.gamma_forward(inputs, terms, reduction, NOTHING, name)[:3])
    apply: Any = autograd.GammaContrastiveFunction.apply
    return GammaOutput(*apply(*inputs, *terms, reduction, name))


def _info_nce(inputs: PairInputs, symmetric: bool, reduction: str, backend: str | None) -> Tensor:
    name = backends.resolve(backend, inputs.x.device.type, inputs.x.dtype)
    wants = wants_of(inputs)
    if torch.compiler.is_compiling():
        loss: Tensor = torch.ops.contrastile.info_nce(*inputs, symmetric, reduction, *wants, name, __version__)[0]
        return loss
    if autograd.needs_no_derivative(wants, *inputs[:3]):
        return formulas.info_nce_forward(inputs, symmetric, reduction, NOTHING, name)[0]
    apply: Any = autograd.InfoNCEFunction.apply
    loss = apply(*inputs, symmetric, reduction, name)
    return loss


def place_of(group: Group | None, exchange: str | None, backend: str | None) -> Place:
    if group is None:
        check_alone(exchange)
    return Place(group, exchange, backend)


def check_alone(exchange: str | None) -> None:
    if exchange is not None:
        raise ValueError(f"exchange is {exchange!r} without a group: there is nothing to exchange")
