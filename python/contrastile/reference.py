"""The oracle: every public function again, dense, in plain PyTorch, written from its definition.

It stores all N x M logits and lets autograd differentiate, so it is meant for float64 truth, for small
problems and for second derivatives. It validates nothing and shares no code with the rest of the package.

    s_ij = scale_i <x_i, y_j>      float64 inputs are computed in float64, all others in float32

Positive is (i, positives[i]); masked are the other pairs of equal group id (and a sample with itself);
negative is every remaining pair.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastile.reference_objectives import directional_info_nce, with_options
from contrastile.reference_structure import (
    brownian_bridge,
    feature_separation,
    four_way_contrastive,
    geometric_consistency,
)

__all__ = [
    "GammaOutput",
    "brownian_bridge",
    "directional_info_nce",
    "feature_separation",
    "four_way_contrastive",
    "gamma_contrastive",
    "geometric_consistency",
    "info_nce",
    "log_normalizers",
    "nt_xent",
    "retrieval_ranks",
    "siglip",
]

Groups = tuple[Tensor, Tensor]


class GammaOutput(NamedTuple):
    """Loss, and the log-normalisers of the same logits, detached; col_lse is None without log_v."""

    loss: Tensor
    row_lse: Tensor
    col_lse: Tensor | None


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
) -> Tensor:
    """InfoNCE (van den Oord et al. 2018, eq. 4); symmetric=True is CLIP's average (Radford et al. 2021, fig. 3).

        row loss i = log( exp(s_i,pos) + sum_neg exp(s_ij) ) - s_i,pos

    The symmetric value of row i averages its row loss and the column loss of column positives[i].

    Args:
        x: anchors (N, D). y: candidates (M, D). scale: number, () or (N,).
        positives: (N,) int64, default arange(N); a permutation if symmetric. groups: ((N,), (M,)) integers.
        hard_negatives: (N, K, D) or (L, D). prior: number or (N,). false_negative_margin: number. See
            `contrastile.info_nce`.

    Returns:
        () for reduction "mean" or "sum", (N,) for "none".
    """
    logits = _logits(x, y, scale)
    positives = _default_positives(x, positives)
    _, is_negative = _kinds(logits, positives, groups)
    if hard_negatives is None and prior is None and not label_smoothing and false_negative_margin is None:
        return _reduce(_info_nce_rows(logits, positives, is_negative, symmetric), reduction)
    products = _logits(x, y, 1.0)
    most_similar = _most_similar(products, positives, false_negative_margin)
    options = label_smoothing, prior, most_similar
    kept = is_negative & ~(products > most_similar[:, None])
    rows = with_options(logits, kept, _at(logits, positives), x, scale, hard_negatives, *options)
    if symmetric:
        kept = is_negative.T[positives] & ~(products.T[positives] > most_similar[:, None])
        columns = with_options(logits.T[positives], kept, _at(logits, positives), x, scale, None, *options)
        rows = (rows + columns) / 2
    return _reduce(rows, reduction)


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
) -> Tensor:
    """NT-Xent (Chen et al. 2020, SimCLR, eq. 1): InfoNCE of z against itself, a sample never its own negative.

    Args:
        z: both views stacked, (2B, D); the positive of i is (i + B) mod 2B. scale: number, () or (2B,).
        positives: (2B,) int64, an involution without fixed points, instead of that pairing.
        hard_negatives, label_smoothing, prior, false_negative_margin: as for `info_nce`.

    Returns:
        () for reduction "mean" or "sum", (2B,) for "none".
    """
    rows = z.shape[0]
    if positives is None:
        positives = torch.arange(rows, device=z.device).roll(-(rows // 2))
    logits = _logits(z, z, scale)
    _, is_negative = _kinds(logits, positives, None)
    is_negative = is_negative & ~torch.eye(rows, dtype=torch.bool, device=z.device)
    if hard_negatives is None and prior is None and not label_smoothing and false_negative_margin is None:
        return _reduce(_info_nce_rows(logits, positives, is_negative, symmetric=False), reduction)
    products = _logits(z, z, 1.0)
    most_similar = _most_similar(products, positives, false_negative_margin)
    kept = is_negative & ~(products > most_similar[:, None])
    terms = z, scale, hard_negatives, label_smoothing, prior, most_similar
    return _reduce(with_options(logits, kept, _at(logits, positives), *terms), reduction)


def log_normalizers(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    *,
    positives: Tensor | None = None,
    groups: Groups | None = None,
    columns: bool = True,
    log_multiplier: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """Log-normalisers whose negatives stand for e^log_multiplier times as many (method: derived).

        row_lse_i = log( exp(s_i,pos) + e^log_multiplier * sum_neg exp(s_ij) )

    Columns likewise, over the rows. Without positives no pair is a positive. An empty sum gives -inf.

    Args:
        x: anchors (N, D). y: candidates (M, D), any N and M. scale: number, () or (N,).
        positives: (N,) int64. groups: ((N,), (M,)) integers. columns: whether col_lse is wanted.

    Returns:
        row_lse (N,) and col_lse (M,) or None.
    """
    logits = _logits(x, y, scale)
    is_positive, is_negative = _kinds(logits, positives, groups)
    weighted = torch.where(is_negative, logits + log_multiplier, torch.where(is_positive, logits, -torch.inf))
    return weighted.logsumexp(1), weighted.logsumexp(0) if columns else None


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
) -> GammaOutput:
    """Gamma-weighted exponential loss (Chen et al., NeurIPS 2022; this form of the bound is derived).

        L_i = -s_pos + g_i ( sum_neg phi(s_ij + log u_i + log_multiplier) + phi(s_pos + log u_i) )
              - log g_i - log u_i - 1

    phi = exp; with cap, the primitive of min(exp, 1): exp(t) for t <= 0 and 1 + t above. For g = 1 it is an upper
    bound of InfoNCE for every u, tighter with the cap, and equal to it at u = 1 / sum_j exp(s_ij).
    With log_v the value of row i averages L_i and the column's L of column positives[i].

    Args:
        x: anchors (N, D). y: candidates (M, D). scale: number, () or (N,).
        log_u: log-weights of the rows, (N,). log_v: of the columns, (M,); needs positives to be a permutation.
        row_draws: g, (N,), default 1. col_draws: (M,). Weights and draws are constants to the gradient.

    Returns:
        loss as `info_nce` reduces it, and log_normalizers of the same arguments, detached.
    """
    logits = _logits(x, y, scale)
    positives = _default_positives(x, positives)
    _, is_negative = _kinds(logits, positives, groups)
    rows = _gamma_bound(logits, positives, is_negative, log_u, row_draws, log_multiplier, cap)
    if log_v is not None:
        row_of_column = positives.argsort()
        columns = _gamma_bound(logits.T, row_of_column, is_negative.T, log_v, col_draws, log_multiplier, cap)
        rows = (rows + columns[positives]) / 2
    with torch.no_grad():
        row_lse, col_lse = log_normalizers(
            x,
            y,
            scale,
            positives=positives,
            groups=groups,
            columns=log_v is not None,
            log_multiplier=log_multiplier,
        )
    return GammaOutput(_reduce(rows, reduction), row_lse, col_lse)


def siglip(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    bias: float | Tensor,
    *,
    positives: Tensor | None = None,
    groups: Groups | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Sigmoid loss (Zhai et al. 2023, eq. 2 and algorithm 1): every pair is a choice of its own between z = 1 and -1.

        l_i = - sum_j log sigmoid( z_ij (s_ij + bias) )       z = 1 for the row's positive, -1 for its negatives

    Args:
        x: anchors (N, D). y: candidates (M, D). scale: number, () or (N,). bias: number or ().
        positives: (N,) int64, default arange(N). groups: ((N,), (M,)) integers: masked pairs are left out.

    Returns:
        () for reduction "mean" (over rows, as in the paper) or "sum", (N,) for "none".
    """
    logits = _logits(x, y, scale)
    logits = logits + torch.as_tensor(bias, dtype=logits.dtype, device=logits.device)
    is_positive, is_negative = _kinds(logits, _default_positives(x, positives), groups)
    losses = -F.logsigmoid(torch.where(is_positive, logits, -logits))
    return _reduce(torch.where(is_positive | is_negative, losses, 0.0).sum(1), reduction)


def retrieval_ranks(
    x: Tensor,
    y: Tensor,
    positives: Tensor | None = None,
    *,
    groups: Groups | None = None,
) -> Tensor:
    """Number of negatives whose inner product with x_i is strictly larger than the positive's; 0 is retrieved first.

    A NaN counts as larger, and a row whose positive is NaN has rank M: what is not a number is never found.

    Args:
        x: queries (N, D). y: candidates (M, D). positives: (N,) int64, default arange(N).
        groups: ((N,), (M,)) integers.

    Returns:
        (N,) int64.
    """
    with torch.no_grad():
        products = _logits(x, y, 1.0)
        positives = _default_positives(x, positives)
        _, is_negative = _kinds(products, positives, groups)
        positive = _at(products, positives)
        larger = (is_negative & ~(products <= positive[:, None])).sum(1)
        return torch.where(positive.isnan(), y.shape[0], larger)


def _logits(x: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    row_scale = torch.as_tensor(scale, dtype=dtype, device=x.device).reshape(-1, 1)
    return row_scale * (x.to(dtype) @ y.to(dtype).T)


def _default_positives(x: Tensor, positives: Tensor | None) -> Tensor:
    return torch.arange(x.shape[0], device=x.device) if positives is None else positives


def _kinds(logits: Tensor, positives: Tensor | None, groups: Groups | None) -> tuple[Tensor, Tensor]:
    """Which pairs are positive and which are negative, (N, M) bool each."""
    is_positive = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    if positives is not None:
        is_positive = positives[:, None] == torch.arange(logits.shape[1], device=logits.device)
    is_negative = ~is_positive
    if groups is not None:
        row_ids, col_ids = groups
        is_negative = is_negative & (row_ids[:, None] != col_ids)
    return is_positive, is_negative


def _most_similar(products: Tensor, positives: Tensor, margin: float | None) -> Tensor:
    return _at(products, positives) + (math.inf if margin is None else margin)


def _at(logits: Tensor, positives: Tensor) -> Tensor:
    return logits.gather(1, positives[:, None]).squeeze(1)


def _info_nce_rows(logits: Tensor, positives: Tensor, is_negative: Tensor, symmetric: bool) -> Tensor:
    rows = _negative_log_likelihood(logits, positives, is_negative)
    if not symmetric:
        return rows
    columns = _negative_log_likelihood(logits.T, positives.argsort(), is_negative.T)
    return (rows + columns[positives]) / 2


def _negative_log_likelihood(logits: Tensor, positives: Tensor, is_negative: Tensor) -> Tensor:
    # log(1 + exp(gap)) rather than log-sum-exp minus s_pos: a confident row's loss keeps all its digits.
    gap = torch.where(is_negative, logits, -torch.inf).logsumexp(1) - _at(logits, positives)
    return torch.logaddexp(torch.zeros_like(gap), gap)


def _gamma_bound(
    logits: Tensor,
    positives: Tensor,
    is_negative: Tensor,
    log_weights: Tensor,
    draws: Tensor | None,
    log_multiplier: float,
    cap: bool,
) -> Tensor:
    log_weights = log_weights.detach().to(logits.dtype)
    draws = torch.ones_like(log_weights) if draws is None else draws.detach().to(logits.dtype)
    positive = _at(logits, positives)
    shifted = torch.where(is_negative, logits + log_weights[:, None] + log_multiplier, -torch.inf)
    mass = _phi(shifted, cap).sum(1) + _phi(positive + log_weights, cap)
    return -positive + draws * mass - draws.log() - log_weights - 1


def _phi(t: Tensor, cap: bool) -> Tensor:
    return torch.where(t <= 0, t.clamp(max=0).exp(), 1 + t) if cap else t.exp()


def _reduce(per_row: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return per_row
    return per_row.mean() if reduction == "mean" else per_row.sum()
