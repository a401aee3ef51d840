"""The contrastive base loss: across modalities both ways, and each modality against its augmentation."""

from __future__ import annotations

from torch import Tensor, nn

from contrastile.functional import info_nce, log_normalizers
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
        backend: as for `info_nce`.

    Returns:
        The loss, (), float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError, RuntimeError: as `info_nce` does.
    """
    v, t, v_aug, t_aug = check_alike({"v": v, "t": t, "v_aug": v_aug, "t_aug": t_aug})
    across = 2 * info_nce(v, t, scale, backend=backend)
    within = in_modal if printed_denominators else augmented
    return (across + within(v, v_aug, scale, backend) + within(t, t_aug, scale, backend)) / 4


class FourWayContrastiveLoss(nn.Module):
    """`four_way_contrastive` as a module (Jiang et al. 2023).

    Args:
        printed_denominators, backend: as for `four_way_contrastive`.
    """

    def __init__(self, *, printed_denominators: bool = False, backend: str | None = None) -> None:
        super().__init__()
        self.printed_denominators = printed_denominators
        self.backend = backend

    def forward(self, v: Tensor, t: Tensor, v_aug: Tensor, t_aug: Tensor, scale: float | Tensor) -> Tensor:
        """The loss, (). Arguments and errors are those of `four_way_contrastive`."""
        return four_way_contrastive(
            v, t, v_aug, t_aug, scale, printed_denominators=self.printed_denominators, backend=self.backend
        )


def augmented(z: Tensor, z_aug: Tensor, scale: float | Tensor, backend: str | None) -> Tensor:
    return info_nce(z, z_aug, scale, symmetric=False, backend=backend)


def in_modal(z: Tensor, z_aug: Tensor, scale: float | Tensor, backend: str | None) -> Tensor:
    """Positives z_aug, denominators over z, the row itself among them."""
    row_lse, _ = log_normalizers(z, z, scale, columns=False, backend=backend)
    dtype = accumulation_dtype(z.dtype)
    return (row_lse - scale * (z.to(dtype) * z_aug.to(dtype)).sum(1)).mean()
