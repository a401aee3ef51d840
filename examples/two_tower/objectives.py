"""The rows of the table: a contrast across modalities, and a structure that is added to it.

    alone      InfoNCE or the gamma loss of images against captions
    CyCLIP     alone + geometric consistency without augmentation, weights 0.25 (Goel et al. 2022)
    four-way   (2 alone + contrast of images and of captions against their augmentation) / 4, the base of the article
    Sep        four-way + feature separation
    Br         four-way + Brownian bridge
    GC         four-way + geometric consistency
    all        four-way + the three                              (Jiang et al. 2023)

STRUCTURE_WEIGHT, of each of the three, is the best of 1, 0.3 and 0.1 for `all` with InfoNCE, by recall@10 of validation
families after 12 epochs: 15, 22 and 25 %, where four-way had 24.

With contrast "gamma" each InfoNCE of `alone` and of `four-way` is a gamma loss with a memory of its own. The contrast
within feature separation stays InfoNCE.
"""

from __future__ import annotations

from collections.abc import Callable

import contrastile as ct
from contrastile import GammaContrastiveLoss
from contrastile.demo.train import GAMMA_SHAPE
from torch import Tensor

from examples.common.embedded import Embedded, structure_loss

CONTRASTS = ("InfoNCE", "gamma")
STRUCTURES = ("alone", "CyCLIP", "four-way", "Sep", "Br", "GC", "all")
ONE_VIEW = ("alone", "CyCLIP")
CYCLIP_WEIGHT = 0.25
STRUCTURE_WEIGHT = 0.1

Contrast = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Objective:
    def __init__(self, contrast: str, structure: str, num_samples: int) -> None:
        self.structure = structure
        self.across = _contrast(contrast, num_samples, symmetric=True)
        self.of_images = _contrast(contrast, num_samples, symmetric=False)
        self.of_captions = _contrast(contrast, num_samples, symmetric=False)

    @property
    def views(self) -> int:
        """How many augmentations of a batch the loss takes."""
        return 1 if self.structure in ONE_VIEW else 2

    def __call__(self, views: list[Embedded], index: Tensor, scale: Tensor) -> Tensor:
        """The loss, (), of a batch of the training samples `index` (B,) in one view or two."""
        v, t, *_ = views[0]
        across = self.across(v, t, index, scale)
        if self.structure == "alone":
            return across
        if self.structure == "CyCLIP":
            return across + ct.geometric_consistency(v, t, cross_weight=CYCLIP_WEIGHT, in_weight=CYCLIP_WEIGHT)
        v_aug, t_aug, *_ = views[1]
        within = self.of_images(v, v_aug, index, scale) + self.of_captions(t, t_aug, index, scale)
        loss = (2 * across + within) / 4
        return loss + STRUCTURE_WEIGHT * structure_loss(self.structure, *views, scale)


def _contrast(name: str, num_samples: int, symmetric: bool) -> Contrast:
    if name == "gamma":
        return GammaContrastiveLoss(num_samples, shape=GAMMA_SHAPE, symmetric=symmetric)
    return lambda x, y, index, scale: ct.info_nce(x, y, scale, symmetric=symmetric)
