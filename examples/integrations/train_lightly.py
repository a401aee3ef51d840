"""SimCLR with lightly's transform and projection head, on emoji: python examples/integrations/train_lightly.py

Needs contrastile[lightly,demo]. With CONTRASTILE_INTEGRATIONS=0 the same with lightly's own loss.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from contrastile.demo.data import IMAGE_SIZE, load_pairs
from contrastile.integrations.lightly import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from PIL import Image
from torch import nn

BATCH, EPOCHS = 128, 3


def main() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002, some of lightly's transforms draw from it
    model = nn.Sequential(encoder(), SimCLRProjectionHead(128, 128, 64, num_layers=2, batch_norm=True))
    loss = NTXentLoss(temperature=0.5)
    print(f"{type(loss).__module__}.{type(loss).__qualname__}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    transform = SimCLRTransform(input_size=IMAGE_SIZE, gaussian_blur=0.0)
    pictures = [
        Image.fromarray(each.permute(1, 2, 0).numpy()) for each in load_pairs(Path("out"), keep_one_in=2).images
    ]
    for epoch in range(EPOCHS):
        total = torch.zeros(())
        batches = torch.randperm(len(pictures)).split(BATCH)[:-1]  # all of one size
        for index in batches:
            first, second = zip(*(transform(pictures[number]) for number in index.tolist()), strict=True)
            found = loss(model(torch.stack(first)), model(torch.stack(second)))
            optimizer.zero_grad()
            found.backward()
            optimizer.step()
            total += found.detach()
        print(f"epoch {epoch}: loss {total / len(batches):.4f}", flush=True)


def encoder() -> nn.Module:
    """(B, 3, 32, 32) -> (B, 128)."""
    layers: list[nn.Module] = []
    for narrow, wide in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1), nn.BatchNorm2d(wide), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


if __name__ == "__main__":
    main()
