"""Two towers under FSDP2: torchrun --nproc-per-node 2 examples/distributed/train_fsdp2.py

Parameters, gradients and the optimizer's state are in shards, one a process; the loss is of the rows of all processes,
over the group of the mesh that shards. FSDP2 averages as DistributedDataParallel does.
"""

from __future__ import annotations

import contrastile as ct
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from toy import Towers, batches


def train(epochs: int = 3) -> list[float]:
    """The mean loss of each epoch."""
    world, rank = distributed.get_world_size(), distributed.get_rank()
    mesh = distributed.init_device_mesh("cpu", (world,))
    model = Towers()
    for part in (model.left, model.right, model):
        fully_shard(part, mesh=mesh)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    found = []
    for epoch in range(epochs):
        losses = []
        for left, right in batches(epoch, world, rank):
            x, y, scale = model(left, right)
            loss = ct.info_nce(x, y, scale[0], group=mesh.get_group())
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
