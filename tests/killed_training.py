"""A training run of two processes that goes on after the death of one: torchrun tests/killed_training.py FOLDER STEP

A tower under DistributedDataParallel, with the gamma loss and its memory over the group, saved by
torch.distributed.checkpoint every second step; it starts from the newest checkpoint in FOLDER. Rank 1 kills itself in
step STEP, between forward and backward, the first time that it comes there.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import contrastile as ct
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

SAMPLES, ROWS, WIDTH = 40, 6, 5
STEPS, EVERY = 6, 2


def checkpoint(step: int) -> str:
    return f"step{step}"


def newest(folder: Path) -> int:
    """Step of the newest checkpoint that is whole: its metadata are written last; 0 where there is none."""
    return max((step for step in range(STEPS) if (folder / checkpoint(step) / ".metadata").exists()), default=0)


def train(folder: Path, rank: int, killed_at: int | None = None) -> dict[str, object]:
    """From the newest checkpoint to the end; what is then in the model, the optimizer and the loss."""
    torch.manual_seed(7)  # the draws' seed and the towers, before a checkpoint replaces both
    group = distributed.group.WORLD
    model = nn.Sequential(nn.Linear(WIDTH, 9), nn.Tanh(), nn.Linear(9, 4))
    model = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loss_fn = ct.GammaContrastiveLoss(SAMPLES, shape=2.0, init_scale=8.0, group=group)
    features = torch.randn(2, SAMPLES, WIDTH, generator=torch.Generator().manual_seed(1))

    def state() -> dict[str, object]:
        of_model, of_optimizer = get_state_dict(model, optimizer)
        return {"model": of_model, "optimizer": of_optimizer, "loss": loss_fn.state_dict()}

    done = newest(folder)
    if done:
        saved = state()
        dcp.load(saved, checkpoint_id=folder / checkpoint(done))
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        loss_fn.load_state_dict(saved["loss"])
    for step in range(done + 1, STEPS + 1):
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(step))
        index = order[rank * ROWS : (rank + 1) * ROWS]
        x, y = F.normalize(model(features[:, index].flatten(0, 1)), dim=1).view(2, ROWS, -1)
        loss = loss_fn(x, y, index)
        if step == killed_at and rank == 1 and not (folder / "killed").exists():
            (folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % EVERY == 0:
            dcp.save(state(), checkpoint_id=folder / checkpoint(step))
    return {"resumed from": done, **state()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    folder, rank = Path(sys.argv[1]), distributed.get_rank()
    torch.save(train(folder, rank, int(sys.argv[2])), folder / f"end{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
    os._exit(0)  # PyTorch's threads may abort a process that is done, while the interpreter takes it down
