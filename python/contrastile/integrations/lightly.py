"""lightly's NTXentLoss: `contrastile.NTXentLoss`, which has its constructor and call."""

from __future__ import annotations

from contrastile import losses
from contrastile.integrations.common import in_place_of

__all__ = ["NTXentLoss"]

NTXentLoss = in_place_of("lightly.loss")(losses.NTXentLoss)
