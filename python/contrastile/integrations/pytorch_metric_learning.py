"""pytorch-metric-learning's SupConLoss, without the matrix of similarities and the masks beside it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from pytorch_metric_learning import losses
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity
from torch import Tensor

from contrastile.functional import log_normalizers
from contrastile.integrations.common import as_autocast_multiplies, in_place_of
from contrastile.validation import accumulation_dtype

__all__ = ["SupConLoss"]


@in_place_of(losses.__name__)
class SupConLoss(losses.SupConLoss):
    """Supervised contrastive loss on (embeddings, labels) (Khosla et al. 2020, eq. 2, L_out).

        l_i = log sum_{a != i} exp(s_ia) - mean_{p: label_p = label_i, p != i} s_ip     s_ij = <z_i, z_j> / temperature

    The first term is one sweep over all pairs; the second needs no pairs, as the mean of the products with z_p is the
    product with the mean of z_p. Takes the place of SupConLoss of pytorch-metric-learning 2.9 with its reducers,
    regularizers and ref_emb. distance is CosineSimilarity or DotProductSimilarity; pairs from a miner are refused.

    Raises:
        ValueError: distance is another one.
    """

    @functools.wraps(losses.SupConLoss.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if type(self.distance) not in (CosineSimilarity, DotProductSimilarity) or self.distance.power != 1:
            raise ValueError(
                f"distance is {type(self.distance).__name__} with power {self.distance.power}: "
                "expected CosineSimilarity or DotProductSimilarity, of power 1"
            )

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: Any,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> dict[str, dict[str, Any]]:
        """Losses by anchor, (N,), for the reducer: 0 for one without a positive, for all where no pair is negative.

        Args:
            embeddings: anchors, (N, D). labels: (N,) integers.
            indices_tuple: None.
            ref_emb, ref_labels: what anchors are compared with, (M, D) and (M,); the anchors themselves where the
                library is given none.

        Raises:
            ValueError: pairs are given, or no labels.
            TypeError, RuntimeError: as `log_normalizers` does.
        """
        if indices_tuple is not None or labels is None or ref_labels is None:
            raise ValueError(
                "indices_tuple is given, or labels or ref_labels are None: expected labels alone; "
                "a choice of pairs would be a mask of all of them"
            )
        own = ref_labels is labels  # as the library tells it
        anchors = as_autocast_multiplies(self.distance.maybe_normalize(embeddings))
        others = anchors if ref_emb is embeddings else as_autocast_multiplies(self.distance.maybe_normalize(ref_emb))
        index = torch.arange(len(anchors), device=anchors.device)
        log_z, _ = log_normalizers(
            anchors, others, 1 / self.temperature, groups=(index, index) if own else None, columns=False
        )

        dtype = accumulation_dtype(anchors.dtype)
        wide, rows = others.to(dtype), anchors.to(dtype)
        kinds, kind = torch.cat([labels, ref_labels]).unique(return_inverse=True)
        of_anchor, of_other = kind[: len(labels)], kind[len(labels) :]
        sums = wide.new_zeros(len(kinds), wide.shape[1]).index_add(0, of_other, wide)[of_anchor]
        counts = wide.new_zeros(len(kinds)).index_add(0, of_other, torch.ones_like(wide[:, 0]))[of_anchor]
        if own:
            sums, counts = sums - wide, counts - 1
        alike = (rows * sums).sum(dim=1) / (self.temperature * counts.clamp(min=1))
        counted = counts > 0 if len(kinds) > 1 else torch.zeros_like(counts, dtype=torch.bool)
        losses_by_anchor = torch.where(counted, log_z - alike, 0.0)
        return {"loss": {"losses": losses_by_anchor, "indices": index, "reduction_type": "element"}}
