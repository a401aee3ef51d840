"""Two small encoders that end on the unit sphere, and the temperature between them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EMBEDDING_DIM = 128
VOCABULARY = 8192  # buckets of hashed n-grams; bucket 0 is padding
NGRAM_LENGTHS = (2, 3, 4)


def ngrams(caption: str) -> list[str]:
    """Words, pairs of neighbouring words and character n-grams of each word with its ends marked."""
    words = caption.split()
    found = [f"<{word}>" for word in words] + [f"{a} {b}" for a, b in zip(words, words[1:], strict=False)]
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


class ResidualBlock(nn.Module):
    """Normalisation is by sample, not by batch: batch statistics would differ with the batch sizes compared."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> same
        return x + self.body(x)


class ImageEncoder(nn.Module):
    def __init__(self, widths: Sequence[int] = (32, 64, 128), dim: int = EMBEDDING_DIM) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        channels = 3
        for width in widths:
            stages += [nn.Conv2d(channels, width, 2, stride=2), ResidualBlock(width)]
            channels = width
        self.features = nn.Sequential(*stages)
        self.head = nn.Sequential(nn.LayerNorm(channels * 16), nn.Linear(channels * 16, dim))

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, 32, 32) uint8 -> (B, dim) unit rows
        pixels = images.float() / 127.5 - 1
        return F.normalize(self.head(self.features(pixels).flatten(1)), dim=1)


class TextEncoder(nn.Module):
    def __init__(self, width: int = 256, dim: int = EMBEDDING_DIM) -> None:
        super().__init__()
        self.embed = nn.EmbeddingBag(VOCABULARY, width, mode="mean", padding_idx=0)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, dim))

    def forward(self, tokens: Tensor) -> Tensor:  # (B, L) int64 -> (B, dim) unit rows
        return F.normalize(self.head(self.embed(tokens)), dim=1)


class TwoTowers(nn.Module):
    def __init__(self, init_scale: float = 10.0) -> None:
        super().__init__()
        self.image, self.text = ImageEncoder(), TextEncoder()
        self.log_scale = nn.Parameter(torch.tensor(math.log(init_scale)))

    @property
    def scale(self) -> Tensor:  # 1 / temperature, as in CLIP at most 100
        return self.log_scale.exp().clamp(max=100.0)
