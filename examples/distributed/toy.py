"""What the examples train on: pairs that share a latent, and two towers to tell which belong together."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

WIDTH, LATENT, BATCH = 24, 8, 32  # the batch of one process


def pairs(count: int = 512) -> TensorDataset:
    """(left, right) of every pair, (WIDTH,) each."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(count, LATENT, generator=generator)
    mixing = torch.randn(2, LATENT, WIDTH, generator=generator)
    left, right = (latent @ mix + torch.randn(count, WIDTH, generator=generator) for mix in mixing)
    return TensorDataset(left, right)


def batches(epoch: int, world: int, rank: int) -> DataLoader[list[Tensor]]:
    """Those of one process of `world`: every pair comes once in an epoch, in one of them."""
    data = pairs()
    sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(data, world, rank)
    sampler.set_epoch(epoch)
    return DataLoader(data, BATCH, sampler=sampler)


class Towers(nn.Module):
    """(left, right) -> unit rows of both sides, and the learned scale, (1,): FSDP2 takes no parameters ()."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)  # the same weights in every process
        self.left, self.right = nn.Linear(WIDTH, LATENT), nn.Linear(WIDTH, LATENT)
        self.log_scale = nn.Parameter(torch.full((1,), 2.0))

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.normalize(self.left(left), dim=1), F.normalize(self.right(right), dim=1), self.log_scale.exp()
