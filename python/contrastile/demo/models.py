"""Two small encoders that end on the unit sphere, and the temperature between them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrastile.demo.data import IMAGE_SIZE

EMBEDDING_DIM = 128
VOCABULARY = 8192  # buckets of hashed n-grams; bucket 0 is padding
NGRAM_LENGTHS = (2, 3, 4)


def ngrams(caption: str) -> list[str]:
    """Words, pairs of neighbouring words and character n-grams of each word with its ends marked."""
    words = caption.split()
    found = [f"<{word}>" for word in words] + [f"{a} {b}" for a, b in pairwise(words)]
    for word in words:
        marked = f"<{word}>"
        found += [marked[i : i + n] for n in NGRAM_LENGTHS for i in range(len(marked) - n + 1)]
    return found


def tokenize(captions: Sequence[str]) -> Tensor:
    """(n, longest) int64 of n-gram buckets, padded with 0. crc32, because hash() differs between processes."""
    tokens = [[1 + zlib.crc32(gram.encode()) % (VOCABULARY - 1) for gram in ngrams(c)] for c in captions]
    padded = torch.zeros(len(tokens), max(map(len, tokens)), dtype=torch.int64)
    for row, ids in zip(padded, tokens, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return padded


class ImageEncoder(nn.Module):
    """Strided convolutions, 32 x 32 pixels to 4 x 4 features.

    Normalised by sample, not by batch: batch statistics would differ between the batch sizes that are compared.
    """

    def __init__(self, widths: Sequence[int] = (32, 64, 128), dim: int = EMBEDDING_DIM) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((3, *widths), widths, strict=False):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.ReLU()]
        features = widths[-1] * (IMAGE_SIZE // 2 ** len(widths)) ** 2
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.LayerNorm(features), nn.Linear(features, dim))

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, IMAGE_SIZE, IMAGE_SIZE) uint8 -> (B, dim) unit rows
        return F.normalize(self.layers(images.float() / 127.5 - 1), dim=1)


class TextEncoder(nn.Module):
    def __init__(self, width: int = 128, hidden: int = 256, dim: int = EMBEDDING_DIM) -> None:
        super().__init__()
        self.ngrams = nn.EmbeddingBag(VOCABULARY, width, mode="mean", padding_idx=0)
        nn.init.normal_(self.ngrams.weight, std=0.1)
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, tokens: Tensor) -> Tensor:  # (B, L) int64 -> (B, dim) unit rows
        return F.normalize(self.layers(self.ngrams(tokens)), dim=1)


class TwoTowers(nn.Module):
    def __init__(self, init_scale: float = 10.0) -> None:
        super().__init__()
        self.image, self.text = ImageEncoder(), TextEncoder()
        self.log_scale = nn.Parameter(torch.tensor(math.log(init_scale)))

    @property
    def scale(self) -> Tensor:  # 1 / temperature, as in CLIP at most 100
        return self.log_scale.exp().clamp(max=100.0)
