"""Trains all runs of a cell side by side."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from examples.synthetic.methods import Step
from examples.synthetic.named import METHODS
from examples.synthetic.problem import Outcome, Problem, embed


@dataclass(frozen=True)
class Cell:
    """One experiment: what is trained on what, and for how long."""

    method: str
    samples: int
    noise: float
    temperature: float
    batch: int
    steps: int
    learning_rate: float = 1e-2  # of Adam, falling to 0 by a cosine


def train(cell: Cell, problem: Problem) -> torch.Tensor:
    """The encoders after training, (2, runs, WIDTH, LATENT). All runs see the same batches in the same order."""
    method, scale = METHODS[cell.method](problem.runs, cell.samples), 1 / cell.temperature
    encoders = problem.start.clone().requires_grad_()
    optimizer = torch.optim.Adam([encoders], lr=cell.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cell.steps)
    generator, order = torch.Generator().manual_seed(7), torch.empty(0, dtype=torch.int64)
    x, y = problem.pairs
    for _ in range(cell.steps):
        if len(order) < cell.batch:
            order = torch.randperm(cell.samples, generator=generator)
        index, order = order[: cell.batch], order[cell.batch :]
        sides = x[index], y[index]
        embedded = torch.stack(embed(sides, encoders))
        gradients = method.gradients(Step(sides, encoders, embedded.detach(), index, scale))
        optimizer.zero_grad()
        embedded.backward(gradients / cell.batch)
        optimizer.step()
        schedule.step()
    return encoders.detach()


def measure(cell: Cell, problem: Problem) -> dict[str, Any]:
    """The cell and its outcome, a list of one number a run each."""
    outcome: Outcome = problem.outcome(train(cell, problem), 1 / cell.temperature)
    return {**asdict(cell), **{name: values.tolist() for name, values in outcome._asdict().items()}}
