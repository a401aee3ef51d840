"""open_clip's ClipLoss and SigLipLoss, alone or inside open_clip's own training script."""

from __future__ import annotations

import importlib

from torch import Tensor

from contrastile import losses
from contrastile.integrations.common import as_autocast_multiplies, in_place_of

__all__ = ["ClipLoss", "SigLipLoss", "install"]


@in_place_of("open_clip.loss")
class ClipLoss(losses.ClipLoss):
    """`contrastile.ClipLoss` that under autocast multiplies in autocast's dtype, as open_clip's does.

    Takes the place of ClipLoss of open_clip 3.3, with its constructor and call. open_clip normalises features in
    float32 under autocast and narrows them in the product; contrastile.ClipLoss keeps the dtype it is given. Logits
    stay float32 here, which open_clip rounds to autocast's dtype.

    Raises:
        ValueError, TypeError, RuntimeError, NotImplementedError: as `contrastile.ClipLoss` does.
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, (), or {"contrastive_loss": loss}; arguments as `contrastile.ClipLoss` takes them."""
        return super().forward(
            as_autocast_multiplies(image_features),
            as_autocast_multiplies(text_features),
            logit_scale,
            logit_bias,
            output_dict,
        )


@in_place_of("open_clip.loss")
class SigLipLoss(losses.SigLipLoss):
    """`contrastile.SigLipLoss` that under autocast multiplies in autocast's dtype, as open_clip's does.

    Takes the place of SigLipLoss of open_clip 3.3, with its constructor and call. Logits stay float32 here.

    Raises:
        ValueError, TypeError, RuntimeError: as `contrastile.SigLipLoss` does.
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, (), or {"contrastive_loss": loss}; arguments as `contrastile.SigLipLoss` takes them."""
        return super().forward(
            as_autocast_multiplies(image_features),
            as_autocast_multiplies(text_features),
            logit_scale,
            logit_bias,
            output_dict,
        )


def install() -> None:
    """From now on open_clip.create_loss, and so its training script, makes these losses where it made its own.

    CoCa and distillation keep open_clip's losses, which read the logits themselves.

    Raises:
        ImportError: open_clip cannot be imported.
        RuntimeError: open_clip.factory has no ClipLoss or no SigLipLoss to take the place of.
    """
    factory = importlib.import_module("open_clip.factory")
    for loss in (ClipLoss, SigLipLoss):
        if not hasattr(factory, loss.__name__):
            raise RuntimeError(
                f"open_clip.factory has no {loss.__name__}: expected open_clip 3.3, whose create_loss reads it there"
            )
        setattr(factory, loss.__name__, loss)
