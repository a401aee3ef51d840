"""Two towers by Lightning: torchrun --nproc-per-node 2 examples/distributed/train_lightning.py (needs lightning)

Its strategy is DistributedDataParallel, over torch.distributed's default group: the loss takes that group. The trainer
gives each process its part of the data.
"""

from __future__ import annotations

import contrastile as ct
import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, distributed
from torch.utils.data import DataLoader
from toy import BATCH, Towers, pairs


class Training(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.towers = Towers()
        self.losses: list[Tensor] = []

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        x, y, scale = self.towers(*batch)
        loss = ct.info_nce(x, y, scale[0], group=distributed.group.WORLD)
        self.losses.append(loss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        if self.trainer.is_global_zero:
            print(f"epoch {self.current_epoch}: loss {torch.stack(self.losses).mean():.4f}", flush=True)
        self.losses.clear()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.02)


if __name__ == "__main__":
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Training(), DataLoader(pairs(), BATCH, shuffle=True))
