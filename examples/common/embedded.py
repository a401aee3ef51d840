"""A batch as the structure losses take it, and these losses by the names of a table's rows."""

from __future__ import annotations

from typing import NamedTuple

import contrastile as ct
from torch import Tensor

SEPARATED, BRIDGED, CONSISTENT = ("Sep", "all"), ("Br", "all"), ("GC", "all")


class Embedded(NamedTuple):
    """A batch, (B, D) unit rows each."""

    v: Tensor  # image
    t: Tensor  # text
    v_ind: Tensor
    t_ind: Tensor


def structure_loss(structure: str, batch: Embedded, augmented: Embedded, scale: Tensor) -> Tensor | float:
    """The sum, (), of what a row adds to its contrast: one of "Sep", "Br", "GC", "all", else 0 (Jiang et al. 2023)."""
    v, t, v_ind, t_ind = batch
    v_aug, t_aug, v_ind_aug, t_ind_aug = augmented
    loss: Tensor | float = 0.0
    if structure in SEPARATED:
        loss = loss + ct.feature_separation(v, t, v_ind, t_ind, v_ind_aug, t_ind_aug, scale=scale)
    if structure in BRIDGED:
        loss = loss + ct.brownian_bridge(v_aug, v, t)
    if structure in CONSISTENT:
        loss = loss + ct.geometric_consistency(v, t, v_aug, t_aug)
    return loss
