"""A head a task on the fused first feature, fine-tuned together with all that is below; and how often it is right.

Of two pictures, each is fused with the statement on its own, and the head is given both features.

All three tasks are fine-tuned at once: a step has a batch of each, and their losses are summed.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

import torch
from contrastile.demo.train import parameter_groups, shuffled_batches, warm_up_then_cosine
from torch import Tensor, nn
from torch.nn import functional as F

from examples.fusion.corpus import Asked, Corpus, cut
from examples.fusion.model import WIDTH, FusionModel
from examples.fusion.questions import ANSWERS, TASKS
from examples.fusion.scenes import Sprites

BATCH = 64  # examples of each task
LEARNING_RATE = 5e-4  # of AdamW; of 5e-4, 1e-3 and 2e-3 the best on questions after two of four epochs, one seed
CHUNK = 256
PICTURES = {"answering": 1, "reasoning": 2, "entailment": 1}  # of an example


class Answering(nn.Module):
    """The model with the heads of the tasks.

    with_pictures: else the text alone is answered from, which tells what can be guessed.
    """

    def __init__(self, model: FusionModel, with_pictures: bool = True) -> None:
        super().__init__()
        self.model, self.with_pictures = model, with_pictures
        self.heads = nn.ModuleDict(
            {
                task: nn.Sequential(nn.Linear(pictures * WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, len(ANSWERS[task])))
                for task, pictures in PICTURES.items()
            }
        )

    def forward(
        self, task: str, asked: Asked, index: Tensor, sprites: Sprites, generator: torch.Generator | None = None
    ) -> Tensor:
        """Logits, (B, answers), of the examples `index` (B,); generator: of the pictures' augmentation, if any."""
        tokens = cut(asked.tokens[index])
        layout = asked.layouts[index].flatten(0, 1)
        patches = self.model.encoders.image(sprites.pictures(layout, generator)) if self.with_pictures else None
        words = self.model.encoders.text(tokens).repeat_interleave(PICTURES[task], 0)
        fused = self.model.fuse(words, tokens.repeat_interleave(PICTURES[task], 0), patches)
        logits: Tensor = self.heads[task](fused[:, 0].unflatten(0, (len(index), -1)).flatten(1))
        return logits


def fine_tune(
    answering: Answering,
    data: Corpus,
    epochs: int,
    generator: torch.Generator,
    on_epoch: Callable[[], None] = lambda: None,
) -> list[dict[str, float]]:
    """The loss of each task, by epoch."""
    count = len(data.train[TASKS[0]].answers)
    a_epoch = count // BATCH
    steps = epochs * a_epoch
    optimizer = torch.optim.AdamW(parameter_groups(answering), lr=LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_up_then_cosine(step / steps))
    orders = [shuffled_batches(count, BATCH, epochs, generator) for _ in TASKS]
    losses: list[dict[str, float]] = []
    for batches in zip(*orders, strict=True):
        found = {
            task: F.cross_entropy(
                answering(task, data.train[task], index, data.sprites, generator), data.train[task].answers[index]
            )
            for task, index in zip(TASKS, batches, strict=True)
        }
        optimizer.zero_grad()
        torch.stack([*found.values()]).sum().backward()
        optimizer.step()
        schedule.step()
        losses.append({task: loss.item() for task, loss in found.items()})
        if len(losses) % a_epoch == 0:
            on_epoch()
    parts = [losses[start : start + a_epoch] for start in range(0, steps, a_epoch)]
    return [{task: mean(loss[task] for loss in part) for task in TASKS} for part in parts]


@torch.no_grad()
def answers(answering: Answering, task: str, asked: Asked, sprites: Sprites) -> Tensor:
    """(n,) int64, positions in ANSWERS[task]."""
    parts = torch.arange(len(asked.answers)).split(CHUNK)
    return torch.cat([answering(task, asked, part, sprites).argmax(1) for part in parts])


def measure(answering: Answering, data: Corpus) -> dict[str, float]:
    """Shares of right answers, 0 to 1: by task, and by sort as 'task: sort'."""
    found: dict[str, float] = {}
    for task, asked in data.held_out.items():
        right = (answers(answering, task, asked, data.sprites) == asked.answers).double()
        found[task] = right.mean().item()
        sorts = [example.sort for example in asked.examples]
        for sort in sorted(set(sorts)):
            found[f"{task}: {sort}"] = right[torch.tensor([each == sort for each in sorts])].mean().item()
    return found
