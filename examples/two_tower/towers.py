"""The demo's encoders, with heads of what the modalities share and of what is a modality's own."""

from __future__ import annotations

from contrastile.demo.models import EMBEDDING_DIM, TwoTowers
from contrastile.structure import SeparatingHeads
from torch import Tensor, nn

from examples.common.embedded import Embedded


class Tower(nn.Module):
    """An encoder, whose unit rows are the features, and the heads on them."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.features = encoder
        self.heads = SeparatingHeads(EMBEDDING_DIM, EMBEDDING_DIM)

    def forward(self, inputs: Tensor) -> Tensor:
        """The shared embedding, (B, EMBEDDING_DIM) unit rows."""
        shared, _ = self.both(inputs)
        return shared

    def both(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Shared and independent embedding."""
        shared, independent = self.heads(self.features(inputs))
        return shared, independent


class HeadedTowers(TwoTowers):
    """The same parameters, and the same start at the same seed, whichever losses train them."""

    def __init__(self, init_scale: float) -> None:
        super().__init__(init_scale)
        self.image, self.text = Tower(self.image), Tower(self.text)

    def embed(self, images: Tensor, tokens: Tensor) -> Embedded:
        v, v_ind = self.image.both(images)
        t, t_ind = self.text.both(tokens)
        return Embedded(v, t, v_ind, t_ind)
