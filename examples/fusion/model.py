"""Encoders of pictures and of words, layers that fuse both, and slow copies of the encoders: the shape of ALBEF.

After Li et al., "Align before fuse: vision and language representation learning with momentum distillation" (NeurIPS
2021), made small: 0.7 M parameters, pictures of 48 x 48 pixels as 9 patches, texts of about 20 words.
"""

from __future__ import annotations

import copy
import math

import torch
from contrastile.structure import SeparatingHeads
from torch import Tensor, nn

from examples.common.embedded import Embedded
from examples.fusion.language import PAD, WORD_NUMBER, WORDS
from examples.fusion.scenes import CELLS

WIDTH, HEADS, FEED_FORWARD, LAYERS = 96, 4, 192, 2  # LAYERS each of pictures, of words, and of both
STEM = (24, 48, 96, WIDTH)  # channels, each at half the size of what is before
EMBEDDING_DIM = 64
LONGEST = 24  # words
MOMENTUM = 0.99
INIT_SCALE, LARGEST_SCALE = 14.0, 100.0
_LAYER = {
    "d_model": WIDTH,
    "nhead": HEADS,
    "dim_feedforward": FEED_FORWARD,
    "dropout": 0.0,
    "activation": "gelu",
    "batch_first": True,
    "norm_first": True,
}


def _encoder() -> nn.TransformerEncoder:
    # A copied layer starts like the first: each gets a start of its own.
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(**_LAYER), LAYERS, nn.LayerNorm(WIDTH), False)
    layers.layers = nn.ModuleList(nn.TransformerEncoderLayer(**_LAYER) for _ in range(LAYERS))
    return layers


class ImageEncoder(nn.Module):
    """Strided convolutions to a feature a cell, then self-attention with a feature of the whole picture in front."""

    def __init__(self) -> None:
        super().__init__()
        stem: list[nn.Module] = []
        for before, width in zip((3, *STEM), STEM, strict=False):
            stem += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.ReLU()]
        self.stem = nn.Sequential(*stem)
        self.start = nn.Parameter(0.1 * torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(0.1 * torch.randn(1 + CELLS, WIDTH))
        self.layers = _encoder()

    def forward(self, pictures: Tensor) -> Tensor:  # (B, 3, S, S) of 0 to 255 -> (B, 1 + CELLS, WIDTH)
        cells = self.stem(pictures / 127.5 - 1).flatten(2).transpose(1, 2)
        patches = torch.cat([self.start.expand(len(cells), -1, -1), cells], 1)
        found: Tensor = self.layers(patches + self.positions)
        return found


class TextEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS), WIDTH)
        nn.init.normal_(self.words.weight, std=0.2)
        self.positions = nn.Parameter(0.1 * torch.randn(LONGEST, WIDTH))
        self.layers = _encoder()

    def forward(self, tokens: Tensor) -> Tensor:  # (B, L) int64 -> (B, L, WIDTH)
        words = self.words(tokens) + self.positions[: tokens.shape[1]]
        found: Tensor = self.layers(words, src_key_padding_mask=padding(tokens))
        return found


class Encoders(nn.Module):
    """Both encoders, with heads of what the modalities share and of what is a modality's own."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = ImageEncoder(), TextEncoder()
        self.image_heads, self.text_heads = (SeparatingHeads(WIDTH, EMBEDDING_DIM) for _ in range(2))

    def embed(self, patches: Tensor, words: Tensor) -> Embedded:
        """Of encoded pictures (B, 1 + CELLS, WIDTH) and texts (B, L, WIDTH) the first feature's embeddings."""
        v, v_ind = self.image_heads(patches[:, 0])
        t, t_ind = self.text_heads(words[:, 0])
        return Embedded(v, t, v_ind, t_ind)


class FusionModel(nn.Module):
    """The same parameters, and the same start at the same seed, whichever losses train them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoders = Encoders()
        self.momentum = copy.deepcopy(self.encoders).requires_grad_(False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(INIT_SCALE)))
        self.no_picture = nn.Parameter(0.1 * torch.randn(1, 1, WIDTH))
        self.fusion = nn.ModuleList(nn.TransformerDecoderLayer(**_LAYER) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.matching = nn.Linear(WIDTH, 2)  # no match, match
        self.word = nn.Linear(WIDTH, len(WORDS))

    @property
    def scale(self) -> Tensor:
        """1 / temperature, ()."""
        return self.log_scale.exp().clamp(max=LARGEST_SCALE)

    def fuse(self, words: Tensor, tokens: Tensor, patches: Tensor | None) -> Tensor:
        """Encoded texts (B, L, WIDTH) that have looked at encoded pictures, or at none: (B, L, WIDTH)."""
        seen = self.no_picture.expand(len(words), -1, -1) if patches is None else patches
        for layer in self.fusion:
            words = layer(words, seen, tgt_key_padding_mask=padding(tokens))
        fused: Tensor = self.norm(words)
        return fused

    @torch.no_grad()
    def embed_slowly(self, pictures: Tensor, tokens: Tensor) -> Embedded:
        """By the slow copies, after these have followed the encoders by 1 - MOMENTUM of the way."""
        torch._foreach_lerp_(list(self.momentum.parameters()), list(self.encoders.parameters()), 1 - MOMENTUM)
        return self.momentum.embed(self.momentum.image(pictures), self.momentum.text(tokens))


def padding(tokens: Tensor) -> Tensor:
    """(B, L) bool: what attention leaves out."""
    return tokens == WORD_NUMBER[PAD]
