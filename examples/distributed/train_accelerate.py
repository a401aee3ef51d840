"""Two towers by Accelerate: torchrun --nproc-per-node 2 examples/distributed/train_accelerate.py (needs accelerate)

What prepare gives is DistributedDataParallel over torch.distributed's default group: the loss takes that group. The
prepared loader gives each process its part of the data.
"""

from __future__ import annotations

import contrastile as ct
import torch
from accelerate import Accelerator
from torch import distributed
from torch.utils.data import DataLoader
from toy import BATCH, Towers, pairs


def train(epochs: int = 3) -> list[float]:
    """The mean loss of each epoch."""
    accelerator = Accelerator(cpu=True)
    towers = Towers()
    optimizer = torch.optim.Adam(towers.parameters(), lr=0.02)
    loader = DataLoader(pairs(), BATCH, shuffle=True)
    model, optimizer, loader = accelerator.prepare(towers, optimizer, loader)
    found = []
    for epoch in range(epochs):
        losses = []
        for left, right in loader:
            x, y, scale = model(left, right)
            loss = ct.info_nce(x, y, scale[0], group=distributed.group.WORLD)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            losses.append(loss.detach())
        found.append(float(torch.stack(losses).mean()))
        accelerator.print(f"epoch {epoch}: loss {found[-1]:.4f}", flush=True)
    accelerator.end_training()
    return found


if __name__ == "__main__":
    train()
