"""Losses of other libraries, computed by contrastile: the same names, constructors and calls.

    from contrastile.integrations.open_clip import ClipLoss, SigLipLoss
    from contrastile.integrations.sentence_transformers import MultipleNegativesRankingLoss
    from contrastile.integrations.lightly import NTXentLoss
    from contrastile.integrations.pytorch_metric_learning import SupConLoss

Nothing of a library is imported before its module here is. With CONTRASTILE_INTEGRATIONS=0 in the environment when
it is, each name is the library's own class.
"""
