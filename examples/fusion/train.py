"""One run: a model from a seed, pre-trained by a row's objective, fine-tuned on the tasks, measured."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from contrastile.demo.train import parameter_groups, shuffled_batches, warm_up_then_cosine

from examples.fusion import corpus
from examples.fusion.corpus import Corpus, cut
from examples.fusion.model import FusionModel
from examples.fusion.objectives import Losses, Objective
from examples.fusion.tasks import Answering, fine_tune, measure

TEXT_ONLY = "text-only"  # the row that is fine-tuned without pictures, from the start
BATCH = 64
LEARNING_RATE = 2e-3  # of AdamW


@dataclass(frozen=True)
class Run:
    """What differs between the runs of a table: one of STRUCTURES or TEXT_ONLY, and the seed."""

    structure: str
    seed: int


@dataclass(frozen=True)
class Settings:
    """What the runs of a table have in common: how many scenes, examples and passes over them."""

    scenes: int
    pretraining_epochs: int
    examples: int  # of each task
    fine_tuning_epochs: int
    measured: int  # examples of each task


def pretrain(
    model: FusionModel, data: Corpus, structure: str, epochs: int, generator: torch.Generator
) -> list[dict[str, float]]:
    """The losses, by epoch."""
    objective = Objective(structure, generator)
    count = len(data.captioned.tokens)
    a_epoch = count // BATCH
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_up_then_cosine(step / (epochs * a_epoch)))
    losses: list[Losses] = []
    for index in shuffled_batches(count, BATCH, epochs, generator):
        layout = data.captioned.layouts[index]
        views = (data.sprites.pictures(layout, generator), data.sprites.pictures(layout, generator))
        found = objective(model, views, cut(data.captioned.tokens[index]), index)
        optimizer.zero_grad()
        found.total().backward()
        optimizer.step()
        schedule.step()
        losses.append(Losses(*(loss.detach() for loss in found)))
    parts = [losses[start : start + a_epoch] for start in range(0, len(losses), a_epoch)]
    return [{name: mean(getattr(loss, name).item() for loss in part) for name in Losses._fields} for part in parts]


def train(data: Corpus, run: Run, settings: Settings) -> tuple[Answering, dict[str, Any]]:
    """The model with its heads, and losses and seconds of both parts. The same seed gives the same start and order."""
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    model = FusionModel()
    answering = Answering(model, with_pictures=run.structure != TEXT_ONLY)
    record: dict[str, Any] = {}
    begin = time.process_time()
    if run.structure != TEXT_ONLY:
        record["pretraining losses"] = pretrain(model, data, run.structure, settings.pretraining_epochs, generator)
    between = time.process_time()
    record["fine-tuning losses"] = fine_tune(answering, data, settings.fine_tuning_epochs, generator)
    record["pretraining seconds"] = round(between - begin, 1)
    record["fine-tuning seconds"] = round(time.process_time() - between, 1)
    return answering, record


def perform(run: Run, settings: Settings, model: Path | None = None) -> dict[str, Any]:
    """The run with what is measured of it; the model with its heads goes to `model`, if given. On one thread."""
    torch.set_num_threads(1)
    data = corpus.load(settings.scenes, settings.examples, settings.measured)
    answering, record = train(data, run, settings)
    if model is not None:
        model.parent.mkdir(parents=True, exist_ok=True)
        torch.save(answering.state_dict(), model)
    return {**asdict(run), **measure(answering, data), **record}
