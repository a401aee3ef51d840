"""SupCon on embeddings and labels: python examples/integrations/train_pytorch_metric_learning.py

Variants of an emoji, such as its skin tones, are of one label. Needs contrastile[pytorch-metric-learning,demo]. With
CONTRASTILE_INTEGRATIONS=0 the same with the library's own loss.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from contrastile.demo.data import load_pairs
from contrastile.integrations.pytorch_metric_learning import SupConLoss
from pytorch_metric_learning.samplers import MPerClassSampler
from torch import nn

BATCH, OF_EACH_LABEL, EPOCHS = 128, 4, 3


def main() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002, the library's sampler draws from it
    emoji = load_pairs(Path("out"))
    variants = Counter(emoji.families)
    kept = [at for at, family in enumerate(emoji.families) if variants[family] >= OF_EACH_LABEL]
    numbers = {family: number for number, family in enumerate(sorted(variants))}
    images = (emoji.images[kept].float() / 255 - 0.5) / 0.25
    labels = torch.tensor([numbers[emoji.families[at]] for at in kept])
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, 64),
    )  # fmt: skip
    loss = SupConLoss(temperature=0.1)
    print(f"{type(loss).__module__}.{type(loss).__qualname__}: {len(images)} pictures, {len(labels.unique())} labels")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sampler = MPerClassSampler(labels, OF_EACH_LABEL, BATCH, length_before_new_iter=len(images))
    for epoch in range(EPOCHS):
        total = torch.zeros(())
        batches = torch.tensor(list(sampler)).split(BATCH)
        for index in batches:
            found = loss(model(images[index]), labels[index])
            optimizer.zero_grad()
            found.backward()
            optimizer.step()
            total += found.detach()
        print(f"epoch {epoch}: loss {total / len(batches):.4f}", flush=True)


if __name__ == "__main__":
    main()
