"""Contrastive losses and their gradients, tile by tile: nothing of size N x M is ever stored."""

from contrastile import autograd, backends, ops, reference
from contrastile.backends import use_backend
from contrastile.cached import GradientCache, cached_backward
from contrastile.evaluate import recall_at_k, retrieval_ranks
from contrastile.functional import GammaOutput, gamma_contrastive, info_nce, log_normalizers, nt_xent
from contrastile.losses import ClipLoss, GammaContrastiveLoss, NTXentLoss
from contrastile.version import __version__ as __version__

__all__ = [
    "ClipLoss",
    "GammaContrastiveLoss",
    "GammaOutput",
    "GradientCache",
    "NTXentLoss",
    "autograd",
    "backends",
    "cached_backward",
    "gamma_contrastive",
    "info_nce",
    "log_normalizers",
    "nt_xent",
    "ops",
    "recall_at_k",
    "reference",
    "retrieval_ranks",
    "use_backend",
]
