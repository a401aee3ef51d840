"""One run: towers from a seed, an objective, a batch; and what is measured of them."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from contrastile.demo.train import parameter_groups, shuffled_batches, warm_up_then_cosine

from examples.two_tower import corpus
from examples.two_tower.corpus import Corpus
from examples.two_tower.measures import measure
from examples.two_tower.objectives import Objective
from examples.two_tower.towers import HeadedTowers

INIT_SCALE = 7.0
# Of AdamW, whatever the batch. By recall@10 of validation families, InfoNCE and one seed: of 1, 2 and 4e-3 the best for
# batches of 32; of 2, 4 and 8e-3 within a point of the best for 128, and the best for 512.
LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Run:
    """What differs between the runs of a table. `batch` is a number of pairs or "all"."""

    contrast: str
    structure: str
    batch: int | str
    seed: int


@dataclass(frozen=True)
class Settings:
    """What the runs of a table have in common."""

    epochs: int
    keep_one_in: int = 1  # families
    validate: bool = False


def train(data: Corpus, run: Run, epochs: int) -> tuple[HeadedTowers, list[float]]:
    """The towers, and the loss of each step.

    The same seed gives the same start, order of pairs and augmentations at the same batch and number of views.
    """
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    count = len(data.dataset.train)
    batch = count if run.batch == "all" else int(run.batch)
    if batch > count:
        raise ValueError(f"batch is {batch}: expected at most {count}, the number of training pairs")
    towers = HeadedTowers(INIT_SCALE)
    objective = Objective(run.contrast, run.structure, count)
    optimizer = torch.optim.AdamW(parameter_groups(towers), lr=LEARNING_RATE, fused=True)
    steps = epochs * (count // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_up_then_cosine(step / steps))
    losses = []
    for index in shuffled_batches(count, batch, epochs, generator):
        views = [towers.embed(*data.view(index, generator)) for _ in range(objective.views)]
        loss = objective(views, index, towers.scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return towers, losses


def perform(run: Run, settings: Settings, cache_folder: Path, model: Path | None = None) -> dict[str, Any]:
    """The run with what is measured of it; its towers go to `model`, if given. On one thread."""
    torch.set_num_threads(1)
    data = corpus.load(cache_folder, settings.keep_one_in, settings.validate)
    begin = time.process_time()
    towers, losses = train(data, run, settings.epochs)
    seconds = time.process_time() - begin
    if model is not None:
        model.parent.mkdir(parents=True, exist_ok=True)
        torch.save(towers.state_dict(), model)
    measured = measure(towers, data, torch.Generator().manual_seed(0))
    a_epoch = len(losses) // settings.epochs
    trained = {
        "steps": len(losses),
        "loss by epoch": [mean(losses[start : start + a_epoch]) for start in range(0, len(losses), a_epoch)],
        "scale": towers.scale.item(),
        "seconds": round(seconds, 1),
    }
    return {**asdict(run), **measured, **trained}
