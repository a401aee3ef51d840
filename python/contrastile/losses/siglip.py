"""SigLIP's loss with open_clip's constructor and call."""

from __future__ import annotations

from torch import Tensor, nn

from contrastile.distributed import Group, default_group
from contrastile.functional_siglip import siglip
from contrastile.validation import one_number

DIST_IMPLS = (None, "bidir", "shift", "reduce", "gather")


class SigLipLoss(nn.Module):
    """Sigmoid loss between image and text features, without the N x N logits.

    Takes the place of SigLipLoss of open_clip 3.3 (Zhai et al. 2023, algorithm 1); the features are used as given, so
    normalise them first. With world_size above 1 the batch is that of all processes, and every process has its loss,
    where open_clip's has that of its own rows: gradients, averaged over processes, are the same. rank and dist_impl are
    moot, as `exchange` says how the features meet, and cache_labels is, as no labels are formed.

    Args:
        cache_labels, rank, world_size, dist_impl: as in open_clip.
        group: process group to take instead of the default one of world_size processes.
        exchange, backend: as for `siglip`.

    Raises:
        ValueError: dist_impl is none of open_clip's.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        group: Group | None = None,
        exchange: str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if dist_impl not in DIST_IMPLS:
            raise ValueError(f"dist_impl is {dist_impl!r}: expected one of {', '.join(map(repr, DIST_IMPLS))}")
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl
        self.group = group
        self.exchange = exchange
        self.backend = backend

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, (), or {"contrastive_loss": loss}.

        Args:
            image_features, text_features: (N, D) each, one dtype; in a group N may differ between processes.
            logit_scale, logit_bias: one number each; a tensor gets its gradient. Without a bias it is 0.
            output_dict: wrap the loss in a dictionary.

        Raises:
            ValueError: as `siglip` does; torch.distributed has not world_size processes.
            TypeError: as `siglip` does.
            RuntimeError: as `siglip` does; world_size is above 1 and torch.distributed not initialised.
        """
        group = self.group
        if group is None and self.world_size > 1:
            group = default_group(self.world_size)
        loss = siglip(
            image_features,
            text_features,
            one_number(logit_scale),
            0.0 if logit_bias is None else one_number(logit_bias),
            group=group,
            exchange=self.exchange,
            backend=self.backend,
        )
        return {"contrastive_loss": loss} if output_dict else loss
