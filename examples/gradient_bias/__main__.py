"""python -m examples.gradient_bias [--out JSON]: how far minibatch gradients are from the gradient over all pairs.

The encoders of examples/synthetic are trained, frozen, and shown batches epoch after epoch: once to fill the memories,
then to average. Of the gradient with respect to the encoders, relative to the norm of the exact one:

    bias     |mean over batches - exact|, less what the mean of so many batches is off by chance
    spread   root mean square of |batch - mean over batches|
    chance   spread / sqrt(batches): a bias well below it is none that was seen
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from contrastile import GammaContrastiveLoss, info_nce
from contrastile.normalizer import BatchLogNormalizer
from contrastile.sweeping_normalizers import ExactLogNormalizer, QueueLogNormalizer, Sides
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from examples.synthetic.problem import LATENT, Problem, embed
from examples.synthetic.train import Cell, train

RESULTS = Path("out/gradient_bias.json")
SAMPLES, NOISES, TEMPERATURES, BATCHES = 4096, (0.5, 1.5), (0.03, 0.1), (8, 32, 128)
TRAINED_STEPS = 30  # well before the optimum, where the exact gradient vanishes and nothing can be relative to it
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of both sides' rows and the samples' numbers


def estimators(samples: int, scale: float, embeddings: Callable[[], Sides]) -> dict[str, Loss]:
    """Minibatch losses whose gradients stand for that of InfoNCE over all samples."""
    options: dict[str, Any] = {"init_scale": scale, "generator": torch.Generator().manual_seed(0)}
    return {
        "InfoNCE": lambda x, y, index: info_nce(x, y, scale),
        "gamma, no memory": GammaContrastiveLoss(samples, normalizer=BatchLogNormalizer(), draws="mean", **options),
        "gamma, mean": GammaContrastiveLoss(samples, draws="mean", **options),
        "gamma, sampled": GammaContrastiveLoss(samples, **options),
        "gamma, lagged": GammaContrastiveLoss(samples, mode="lagged", draws="mean", **options),
        "gamma, queue of 1024": GammaContrastiveLoss(
            samples, mode="lagged", draws="mean", normalizer=QueueLogNormalizer(1024, LATENT), **options
        ),
        "gamma, exact": GammaContrastiveLoss(
            samples, mode="lagged", cap=False, draws="mean", normalizer=ExactLogNormalizer(embeddings), **options
        ),
    }


def deviation(
    loss: Loss, problem: Problem, encoders: Tensor, batch: int, exact: Tensor, epochs: int
) -> dict[str, float]:
    """bias and spread over `epochs` epochs that follow a first one."""
    x, y = problem.pairs
    generator, total, squares, count = torch.Generator().manual_seed(1), torch.zeros_like(exact), 0.0, 0
    for epoch in range(1 + epochs):
        for index in torch.randperm(problem.samples, generator=generator).split(batch):
            found = gradient(loss, (x[index], y[index]), encoders, index).double()
            if epoch > 0:
                total, squares, count = total + found, squares + float((found**2).sum()), count + 1
    mean, norm = total / count, float(exact.norm())
    variance = max(squares / count - float((mean**2).sum()), 0.0) * count / (count - 1)
    off = float(((mean - exact) ** 2).sum()) - variance / count
    return {
        "bias": max(off, 0.0) ** 0.5 / norm,
        "spread": variance**0.5 / norm,
        "chance": (variance / count) ** 0.5 / norm,
    }


def gradient(loss: Loss, sides: tuple[Tensor, Tensor], encoders: Tensor, index: Tensor) -> Tensor:
    leaf = encoders.clone().requires_grad_()
    rows = [side[0] for side in embed(sides, leaf)]
    return torch.autograd.grad(loss(*rows, index), leaf)[0]


def measure(noise: float, temperature: float, batches: tuple[int, ...], samples: int, epochs: int) -> list[dict]:
    problem, scale = Problem(1, samples, noise), 1 / temperature
    cell = Cell("InfoNCE", samples, noise, temperature, batch=256, steps=TRAINED_STEPS)
    encoders = train(cell, problem)
    everything = cast(Sides, tuple(side[0] for side in embed(problem.pairs, encoders)))
    exact = gradient(lambda x, y, index: info_nce(x, y, scale), problem.pairs, encoders, torch.arange(samples)).double()
    return [
        {"noise": noise, "temperature": temperature, "batch": batch, "estimator": name}
        | deviation(loss, problem, encoders, batch, exact, epochs)
        for batch in batches
        for name, loss in estimators(samples, scale, lambda: everything).items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.gradient_bias", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="results, JSON (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=10, help="epochs averaged over (default 10)")
    options = parser.parse_args()
    cells = list(itertools.product(NOISES, TEMPERATURES))
    rows = [row for cell in track(cells, "measuring") for row in measure(*cell, BATCHES, SAMPLES, options.epochs)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"torch": torch.__version__, "samples": SAMPLES, "rows": rows}) + "\n")
    table = Table(title="gradient of a minibatch, relative to the norm of the exact gradient")
    for name in ("noise", "temperature", "batch", "estimator", "bias", "spread", "chance"):
        table.add_column(name, justify="left" if name == "estimator" else "right")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
