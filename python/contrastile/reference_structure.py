"""The oracle of the latent modality structures, dense, from their definitions; reached as contrastile.reference."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

__all__ = ["brownian_bridge", "feature_separation", "four_way_contrastive", "geometric_consistency"]


def geometric_consistency(
    v: Tensor,
    t: Tensor,
    v_aug: Tensor | None = None,
    t_aug: Tensor | None = None,
    *,
    cross_weight: float = 1.0,
    in_weight: float = 1.0,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Geometric consistency (Jiang et al. 2023): differences of the (N, N) matrices of products, squared and summed.

    Args:
        v, t, v_aug, t_aug: (N, D). row_weights: (N,); pair (j, k) counts w_j w_k, and the sum is divided by sum w.

    Returns:
        ().
    """
    v, t = _widened(v), _widened(t)
    weights = torch.ones_like(v[:, 0]) if row_weights is None else row_weights.detach().to(v.dtype)
    across = v @ t.T
    loss = cross_weight * _weighted(across - across.T, weights)
    loss = loss + in_weight * _weighted(v @ v.T - t @ t.T, weights)
    if v_aug is not None and t_aug is not None:
        v_aug, t_aug = _widened(v_aug), _widened(t_aug)
        loss = loss + in_weight * _weighted(v @ v.T - v_aug @ v_aug.T, weights)
        loss = loss + in_weight * _weighted(t @ t.T - t_aug @ t_aug.T, weights)
        loss = loss + cross_weight * (weights * ((v * t).sum(1) - (v_aug * t_aug).sum(1)) ** 2).sum()
    return loss / weights.sum()


def brownian_bridge(
    v_aug: Tensor,
    v: Tensor,
    t: Tensor,
    *,
    time: float | Tensor = 0.25,
    likelihood_weight: bool = False,
    detach_aug: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Distance to the bridge's mean, brought to length 1 (Jiang et al. 2023, L_Br, its first line).

    Args:
        v_aug, v, t: (N, D). time: a number, () or (N,).

    Returns:
        () for reduction "mean" or "sum", (N,) for "none".
    """
    v_aug, v, t = _widened(v_aug.detach() if detach_aug else v_aug), _widened(v), _widened(t)
    at = torch.as_tensor(time, dtype=v.dtype, device=v.device).detach().expand(len(v))
    mean = at[:, None] * v + (1 - at[:, None]) * t
    is_zero = (mean == 0).all(1, keepdim=True)
    length = torch.where(is_zero, 1.0, mean).norm(dim=1, keepdim=True)
    values = (v_aug - torch.where(is_zero, 0.0, mean / length)).square().sum(1)
    if likelihood_weight:
        values = values / (2 * at * (1 - at))
    if reduction == "none":
        return values
    return values.mean() if reduction == "mean" else values.sum()


def four_way_contrastive(
    v: Tensor,
    t: Tensor,
    v_aug: Tensor,
    t_aug: Tensor,
    scale: float | Tensor,
    *,
    printed_denominators: bool = False,
) -> Tensor:
    """(V2T + T2V + V2V + T2T) / 4 (Jiang et al. 2023, L_Con).

    Args:
        v, t, v_aug, t_aug: (N, D). scale: number, () or (N,).

    Returns:
        ().
    """
    v, t, v_aug, t_aug = map(_widened, (v, t, v_aug, t_aug))
    within = _contrast(v, v_aug, v if printed_denominators else v_aug, scale)
    within = within + _contrast(t, t_aug, t if printed_denominators else t_aug, scale)
    # Both directions share the logits scale_i <v_i, t_j>, as info_nce's do.
    logits = _by_row(scale, v) * (v @ t.T)
    across = (logits.logsumexp(1) - logits.diagonal() + logits.logsumexp(0) - logits.diagonal()).mean()
    return (across + within) / 4


def feature_separation(
    v: Tensor,
    t: Tensor,
    v_ind: Tensor,
    t_ind: Tensor,
    v_ind_aug: Tensor | None = None,
    t_ind_aug: Tensor | None = None,
    *,
    scale: float | Tensor,
    printed_denominators: bool = False,
) -> Tensor:
    """Deep feature separation (Jiang et al. 2023, L_Sep) with uniformity over pairs of distinct rows.

    Args:
        v, t, v_ind, t_ind, v_ind_aug, t_ind_aug: (N, D). scale: number, () or (N,).

    Returns:
        ().
    """
    loss = torch.zeros((), dtype=torch.promote_types(v.dtype, torch.float32), device=v.device)
    for shared, own, positive in ((v, v_ind, v_ind_aug), (t, t_ind, t_ind_aug)):
        shared, own = _widened(shared), _widened(own)
        positive = own if positive is None else _widened(positive)
        loss = loss + (shared * own).sum(1).square().mean()
        loss = loss + _contrast(own, positive, own if printed_denominators else positive, scale)
        closeness = (4 * own @ own.T - 4).masked_fill(
            torch.eye(len(own), dtype=torch.bool, device=v.device), -torch.inf
        )
        loss = loss + closeness.flatten().logsumexp(0) - log(len(own) * (len(own) - 1))
    return loss


def _contrast(anchors: Tensor, positives: Tensor, candidates: Tensor, scale: float | Tensor) -> Tensor:
    row_scale = _by_row(scale, anchors)
    positive = row_scale[:, 0] * (anchors * positives).sum(1)
    return ((row_scale * (anchors @ candidates.T)).logsumexp(1) - positive).mean()


def _by_row(scale: float | Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(scale, dtype=like.dtype, device=like.device).reshape(-1, 1)


def _weighted(differences: Tensor, weights: Tensor) -> Tensor:
    return (weights[:, None] * weights * differences.square()).sum()


def _widened(embeddings: Tensor) -> Tensor:
    return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
