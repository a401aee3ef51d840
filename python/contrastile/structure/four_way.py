"""The contrastive base loss: across modalities both ways, and each modality against its augmentation."""

from __future__ import annotations

from torch import Tensor, nn

from contrastile.distributed import Group
from contrastile.functional import info_nce, log_normalizers, place_of
from contrastile.structure.batch import BatchRows, check_rows
from contrastile.validation import accumulation_dtype, check_alike

__all__ = ["FourWayContrastiveLoss", "four_way_contrastive"]


def four_way_contrastive(
    v: Tensor,
    t: Tensor,
    v_aug: Tensor,
    t_aug: Tensor,
    scale: float | Tensor,
    *,
    printed_denominators: bool = False,
    group: Group | None = None,
    exchange: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """(V2T + T2V + V2V + T2T) / 4 (Jiang et al. 2023, L_Con), by three sweeps over pairs.

        V2T   InfoNCE of v against t, T2V of t against v: one sweep for both
        V2V   InfoNCE of v against v^a, T2T of t against t^a: one direction each

    Args:
        v, t, v_aug, t_aug: (N, D), as for `info_nce`; v_aug and t_aug embed augmented inputs.
        scale: as for `info_nce`, of all four.
        printed_denominators: V2V and T2T as the paper prints them: negatives are the batch's own v or t, the row itself
            among them, instead of its augmentations: logsumexp_k(scale <v_j, v_k>) - scale <v_j, v^a_j>.
        group, exchange, backend: as for `info_nce`; v_aug and t_aug are of own rows too.

    Returns:
        The loss, (), float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError, RuntimeError: as `info_nce` does.
    """

    def prepare(may_be_empty: bool) -> list[Tensor]:
        return check_alike({"v": v, "t": t, "v_aug": v_aug, "t_aug": t_aug}, may_be_empty=may_be_empty)

    place = place_of(group, exchange, backend)
    parts, rows = check_rows("four_way_contrastive", prepare, place, printed_denominators=printed_denominators)
    v, t, v_aug, t_aug = parts
    across = 2 * info_nce(v, t, scale, **place._asdict())
    within = in_modal if printed_denominators else augmented
    return (across + within(v, v_aug, scale, rows) + within(t, t_aug, scale, rows)) / 4


class FourWayContrastiveLoss(nn.Module):
    """`four_way_contrastive` as a module (Jiang et al. 2023).

    Args:
        printed_denominators, group, exchange, backend: as for `four_way_contrastive`.
    """

    def __init__(
        self,
        *,
        printed_denominators: bool = False,
        group: Group | None = None,
        exchange: str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.printed_denominators = printed_denominators
        self.group = group
        self.exchange = exchange
        self.backend = backend

    def forward(self, v: Tensor, t: Tensor, v_aug: Tensor, t_aug: Tensor, scale: float | Tensor) -> Tensor:
        """The loss, (). Arguments and errors are those of `four_way_contrastive`."""
        return four_way_contrastive(
            v,
            t,
            v_aug,
            t_aug,
            scale,
            printed_denominators=self.printed_denominators,
            group=self.group,
            exchange=self.exchange,
            backend=self.backend,
        )


def augmented(z: Tensor, z_aug: Tensor, scale: float | Tensor, rows: BatchRows) -> Tensor:
    return info_nce(z, z_aug, scale, symmetric=False, **rows.place._asdict())


def in_modal(z: Tensor, z_aug: Tensor, scale: float | Tensor, rows: BatchRows) -> Tensor:
    """Positives z_aug, denominators over z, the row itself among them."""
    row_lse, _ = log_normalizers(z, z, scale, columns=False, **rows.place._asdict())
    dtype = accumulation_dtype(z.dtype)
    return rows.sum((row_lse - scale * (z.to(dtype) * z_aug.to(dtype)).sum(1)).sum()) / rows.total
