"""The losses as modules: a constructor that keeps options and state, a forward that calls the functions."""

from contrastile.losses.clip import ClipLoss
from contrastile.losses.gamma import GammaContrastiveLoss
from contrastile.losses.info_nce import DirectionalInfoNCELoss, InfoNCELoss, MatryoshkaLoss
from contrastile.losses.nt_xent import NTXentLoss
from contrastile.losses.robust import RobustContrastiveLoss
from contrastile.losses.siglip import SigLipLoss

__all__ = [
    "ClipLoss",
    "DirectionalInfoNCELoss",
    "GammaContrastiveLoss",
    "InfoNCELoss",
    "MatryoshkaLoss",
    "NTXentLoss",
    "RobustContrastiveLoss",
    "SigLipLoss",
]
