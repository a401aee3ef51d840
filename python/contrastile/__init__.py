"""Contrastive losses and their gradients, tile by tile: nothing of size N x M is ever stored."""

from contrastile import autograd, backends, ops, reference, structure
from contrastile.backends import use_backend
from contrastile.cached import GradientCache, cached_backward
from contrastile.evaluate import recall_at_k, retrieval_ranks
from contrastile.functional import GammaOutput, gamma_contrastive, info_nce, log_normalizers, nt_xent
from contrastile.functional_directional import directional_info_nce
from contrastile.functional_siglip import siglip
from contrastile.losses import (
    ClipLoss,
    DirectionalInfoNCELoss,
    GammaContrastiveLoss,
    InfoNCELoss,
    MatryoshkaLoss,
    NTXentLoss,
    RobustContrastiveLoss,
    SigLipLoss,
)
from contrastile.matryoshka import matryoshka
from contrastile.structure import (
    BrownianBridgeLoss,
    FeatureSeparationLoss,
    FourWayContrastiveLoss,
    GeometricConsistencyLoss,
    SeparatingHeads,
    brownian_bridge,
    feature_separation,
    four_way_contrastive,
    geometric_consistency,
)
from contrastile.version import __version__ as __version__

__all__ = [
    "BrownianBridgeLoss",
    "ClipLoss",
    "DirectionalInfoNCELoss",
    "FeatureSeparationLoss",
    "FourWayContrastiveLoss",
    "GammaContrastiveLoss",
    "GammaOutput",
    "GeometricConsistencyLoss",
    "GradientCache",
    "InfoNCELoss",
    "MatryoshkaLoss",
    "NTXentLoss",
    "RobustContrastiveLoss",
    "SeparatingHeads",
    "SigLipLoss",
    "autograd",
    "backends",
    "brownian_bridge",
    "cached_backward",
    "directional_info_nce",
    "feature_separation",
    "four_way_contrastive",
    "gamma_contrastive",
    "geometric_consistency",
    "info_nce",
    "log_normalizers",
    "matryoshka",
    "nt_xent",
    "ops",
    "recall_at_k",
    "reference",
    "retrieval_ranks",
    "siglip",
    "structure",
    "use_backend",
]
