"""The oracle of what a softmax may have beside the pairs of a batch, dense; reached as contrastile.reference.

Every loss is a list of candidates for each row, (N, C) logits of which some are kept, beside the positive's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["directional_info_nce"]

Groups = tuple[Tensor, Tensor]


def directional_info_nce(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    *,
    directions: Sequence[str] = ("xy", "xx", "yy"),
    partition: str = "joint",
    positives: Tensor | None = None,
    groups: Groups | None = None,
    hard_negatives: Tensor | None = None,
    label_smoothing: float = 0.0,
    prior: float | Tensor | None = None,
    false_negative_margin: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of s_i,pos against the candidates of every direction: x with y, y with x, x with x, y with y.

    "joint": all candidates in one sum, with "yx" the positive once more (Li et al. 2023). "per_direction": the mean of
    a loss for each. A candidate of the row's own, or of equal id, is left out, and one whose product with its row is
    above <x_i, y_pos(i)> by more than the margin; hard negatives are candidates in "xy".

    Args:
        x: anchors (N, D). y: candidates (M, D). scale: number, () or (N,). positives: (N,) int64, default arange(N).
        groups: ((N,), (M,)) integers. Others as `info_nce`.

    Returns:
        () for reduction "mean" or "sum", (N,) for "none".
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide_x, wide_y = x.to(dtype), y.to(dtype)
    row_scale = torch.as_tensor(scale, dtype=dtype, device=x.device).reshape(-1, 1).expand(len(x), 1)
    positives = torch.arange(len(x), device=x.device) if positives is None else positives
    paired = wide_y[positives]
    own_product = (wide_x * paired).sum(1)
    positive = row_scale[:, 0] * own_product
    row_ids, col_ids = (x.new_zeros(len(x)), x.new_ones(len(y))) if groups is None else groups
    of_pair = row_ids if groups is None else col_ids[positives]
    own_row = torch.eye(len(x), dtype=torch.bool, device=x.device)
    own_col = positives[:, None] == torch.arange(len(y), device=x.device)
    ungrouped = groups is None
    products = {"xy": wide_x @ wide_y.T, "yx": paired @ wide_x.T, "xx": wide_x @ wide_x.T, "yy": paired @ wide_y.T}
    kept_of = {
        "xy": ~own_col & (row_ids[:, None] != col_ids),
        "yx": ~own_row & (ungrouped | (of_pair[:, None] != row_ids)),
        "xx": ~own_row & (ungrouped | (row_ids[:, None] != row_ids)),
        "yy": ~own_col & (ungrouped | (of_pair[:, None] != col_ids)),
    }
    margin = math.inf if false_negative_margin is None else false_negative_margin
    most_similar = own_product + margin

    def block(name: str) -> tuple[Tensor, Tensor]:
        scales = row_scale.T if name == "yx" else row_scale
        return scales * products[name], kept_of[name] & ~(products[name] > most_similar[:, None])

    def loss_of(names: Sequence[str], twice: bool) -> Tensor:
        blocks = [block(name) for name in names]
        logits, kept = (torch.cat(parts, 1) for parts in zip(*blocks, strict=True))
        if twice:
            logits = torch.cat([logits, positive[:, None]], 1)
            kept = torch.cat([kept, torch.ones_like(kept[:, :1])], 1)
        hard = hard_negatives if "xy" in names else None
        return with_options(logits, kept, positive, x, scale, hard, label_smoothing, prior, most_similar)

    if partition == "joint":
        rows = loss_of(directions, "yx" in directions)
    else:
        rows = torch.stack([loss_of([name], False) for name in directions]).mean(0)
    if reduction == "none":
        return rows
    return rows.mean() if reduction == "mean" else rows.sum()


def with_options(
    logits: Tensor,
    kept: Tensor,
    positive: Tensor,
    x: Tensor,
    scale: float | Tensor,
    hard_negatives: Tensor | None,
    label_smoothing: float,
    prior: float | Tensor | None,
    most_similar: Tensor,
) -> Tensor:
    """Loss of each row, (N,), from the logits of its candidates (N, C), those that are kept, and its positive's (N,).

    A hard negative is kept unless its product with the row is above most_similar, (N,).

        g = max( (mean of exp(s) over the kept - tau exp(s_pos)) / (1 - tau), exp(-scale) )    (Chuang et al. 2020)
        l = log( exp(s_pos) + C g ) - s_pos + label_smoothing (s_pos - mean of s over the kept and the positive)

    all exponentials relative to the row's largest logit. Without a prior, g is the mean.
    """
    row_scale = torch.as_tensor(scale, dtype=logits.dtype, device=logits.device).reshape(-1, 1)
    if hard_negatives is not None:
        wide_x, hard = x.to(logits.dtype), hard_negatives.to(logits.dtype)
        products = wide_x @ hard.T if hard.dim() == 2 else torch.einsum("nd,nkd->nk", wide_x, hard)
        logits = torch.cat([logits, row_scale * products], 1)
        kept = torch.cat([kept, ~(products > most_similar[:, None])], 1)
    count = kept.sum(1)
    negatives = torch.where(kept, logits, -torch.inf)
    top = torch.cat([negatives, positive[:, None]], 1).detach().amax(1)
    of_positive = (positive - top).exp()
    total = (negatives - top[:, None]).exp().sum(1)
    if prior is not None:
        tau = torch.as_tensor(prior, dtype=logits.dtype, device=logits.device)
        mean = total / count.clamp(min=1)
        floor = (-row_scale[:, 0] - top).exp()
        total = count * torch.maximum((mean - tau * of_positive) / (1 - tau), floor)
    something = total > 0
    gap = torch.where(something, torch.where(something, total, 1).log() + top - positive, -torch.inf)
    gap = torch.where(total.isnan(), total, gap)
    losses = torch.logaddexp(torch.zeros_like(gap), gap)
    if not label_smoothing:
        return losses
    mean = (torch.where(kept, logits, 0).sum(1) + positive) / (count + 1)
    return losses + label_smoothing * (positive - mean)
