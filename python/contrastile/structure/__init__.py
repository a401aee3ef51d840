"""Latent modality structures (Jiang et al., CVPR 2023): regularisers of two modalities' embeddings, beside a contrast.

geometry     geometric consistency, by Gram matrices of D x D
bridge       Brownian bridge between a pair, one pass over rows
separation   shared and independent features, by that pass and the sweeps over pairs
four_way     the contrastive base loss, in-modal and cross-modal
"""

from contrastile.structure.bridge import BrownianBridgeLoss, brownian_bridge
from contrastile.structure.four_way import FourWayContrastiveLoss, four_way_contrastive
from contrastile.structure.geometry import GeometricConsistencyLoss, geometric_consistency
from contrastile.structure.separation import FeatureSeparationLoss, SeparatingHeads, feature_separation

__all__ = [
    "BrownianBridgeLoss",
    "FeatureSeparationLoss",
    "FourWayContrastiveLoss",
    "GeometricConsistencyLoss",
    "SeparatingHeads",
    "brownian_bridge",
    "feature_separation",
    "four_way_contrastive",
    "geometric_consistency",
]
