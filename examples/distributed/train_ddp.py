"""Two towers under DistributedDataParallel: torchrun --nproc-per-node 2 examples/distributed/train_ddp.py

The loss is of the rows of all processes, equal in all, and the average that DistributedDataParallel takes is the
gradient of it, in the learned scale too.
"""

from __future__ import annotations

import contrastile as ct
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from toy import Towers, batches


def train(epochs: int = 3) -> list[float]:
    """The mean loss of each epoch."""
    world, rank = distributed.get_world_size(), distributed.get_rank()
    model = DistributedDataParallel(Towers())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    found = []
    for epoch in range(epochs):
        losses = []
        for left, right in batches(epoch, world, rank):
            x, y, scale = model(left, right)
            loss = ct.info_nce(x, y, scale[0], group=distributed.group.WORLD)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        found.append(float(torch.stack(losses).mean()))
        if rank == 0:
            print(f"epoch {epoch}: loss {found[-1]:.4f}", flush=True)
    return found


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    train()
    distributed.destroy_process_group()
