"""Losses as the coefficients dL/ds_ij of many runs at once.

A run of this size is a few microseconds of arithmetic, so all runs of an experiment share one step. What is learned
from one step to the next is the package's own: its memories, its draws, one entry a run and sample. Only the pairs,
(runs, B, B) logits, are written densely here, and the tests hold them to the losses of the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from contrastile.draws import GammaDraws
from contrastile.normalizer import BatchLogNormalizer, LogNormalizerMemory, PairBatch
from torch import Tensor


class Method(Protocol):
    """One loss, with what it remembers of `runs` runs over `samples` samples each."""

    def coefficients(self, logits: Tensor, index: Tensor, scale: float) -> Tensor:
        """dL/ds of each run's mean loss, (runs, B, B), for logits of that shape and sample numbers index (B,)."""


class InfoNCE:
    def coefficients(self, logits: Tensor, index: Tensor, scale: float) -> Tensor:
        return (logits.softmax(1) + logits.softmax(2)) / 2 - _identity(logits)


class DCL:
    """Without the positive in the denominator: Yeh et al., "Decoupled contrastive learning", ECCV 2022."""

    def coefficients(self, logits: Tensor, index: Tensor, scale: float) -> Tensor:
        negatives = logits.masked_fill(_identity(logits).bool(), -torch.inf)
        return (negatives.softmax(1) + negatives.softmax(2)) / 2 - _identity(logits)


class SogCLR:
    """u_i <- (1 - rate) u_i + rate mean_j exp(s_ij - s_ii) over negatives j, weights exp(s_ij - s_ii) / u_i.

    Yuan et al., "Provable stochastic optimization for global contrastive learning", ICML 2022.
    """

    def __init__(self, runs: int, samples: int, rate: float = 0.9) -> None:
        self.memory = _Remembered(LogNormalizerMemory(runs * samples, update_rate=rate), samples)

    def coefficients(self, logits: Tensor, index: Tensor, scale: float) -> Tensor:
        own = logits.diagonal(dim1=1, dim2=2)
        margins = [logits - own[:, :, None], (logits - own[:, None, :]).mT]
        margins = [each.masked_fill(_identity(logits).bool(), -torch.inf) for each in margins]
        count = logits.shape[-1] - 1
        found = torch.stack([each.logsumexp(2) for each in margins]) - math.log(count)
        self.memory.update(found, index, 1.0)
        rows, cols = (
            (each - u[:, :, None]).exp() / count
            for each, u in zip(margins, self.memory.estimate(found, index, 1.0), strict=True)
        )
        sums = torch.diag_embed(rows.sum(2) + cols.sum(2))
        return (rows + cols.mT - sums) / 2


class Gamma:
    """GammaContrastiveLoss, with a memory or with the batch's own log-normalisers alone."""

    def __init__(
        self, runs: int, samples: int, *, mode: str = "mixed", memory: bool = True, sampled: bool = False
    ) -> None:
        normalizer = LogNormalizerMemory(runs * samples) if memory else BatchLogNormalizer()
        self.memory = _Remembered(normalizer, samples)
        self.samples, self.mode = samples, mode
        self.draws = GammaDraws(generator=torch.Generator().manual_seed(0)) if sampled else None

    def coefficients(self, logits: Tensor, index: Tensor, scale: float) -> Tensor:
        identity = _identity(logits)
        log_multiplier = math.log((self.samples - 1) / (logits.shape[-1] - 1))
        logits = logits + log_multiplier * (1 - identity)
        found = torch.stack([logits.logsumexp(2), logits.logsumexp(1)])
        if self.mode == "mixed":
            self.memory.update(found, index, scale)
        believed = self.memory.estimate(found, index, scale)
        if self.mode == "lagged":
            self.memory.update(found, index, scale)
        exponents = torch.stack([logits - believed[0][:, :, None], logits - believed[1][:, None, :]])
        if self.mode == "lagged":
            exponents = exponents.clamp(max=0)
        rows, cols = exponents.exp()
        if self.draws is not None:
            row_draws, col_draws = self.draws(found.numel()).view_as(found)
            rows, cols = rows * row_draws[:, :, None], cols * col_draws[:, None, :]
        return (rows + cols) / 2 - identity


class _Remembered:
    """A normaliser of the package that holds the samples of all runs, run after run."""

    def __init__(self, normalizer: LogNormalizerMemory | BatchLogNormalizer, samples: int) -> None:
        self.normalizer, self.samples = normalizer, samples

    def estimate(self, found: Tensor, index: Tensor, scale: float) -> Tensor:
        """What is remembered, and what the batch found where nothing is: (2, runs, B), as `found`."""
        rows, cols = self.normalizer.estimate(*self._of(found, index, scale))
        known = torch.stack([rows, rows if cols is None else cols]).view_as(found)
        return torch.where(known == -torch.inf, found, known)

    def update(self, found: Tensor, index: Tensor, scale: float) -> None:
        flat, batch = self._of(found, index, scale)
        self.normalizer.update(flat, *found.flatten(1), batch)

    def _of(self, found: Tensor, index: Tensor, scale: float) -> tuple[Tensor, PairBatch]:
        runs = torch.arange(found.shape[1])[:, None]
        flat = (index + runs * self.samples).flatten()
        return flat, PairBatch(flat[:, None], flat[:, None], scale, None, True, self.samples, None)


def _identity(logits: Tensor) -> Tensor:
    return torch.eye(logits.shape[-1])


METHODS: dict[str, Callable[[int, int], Method]] = {
    "InfoNCE": lambda runs, samples: InfoNCE(),
    "DCL": lambda runs, samples: DCL(),
    "SogCLR": SogCLR,
    "gamma, no memory": lambda runs, samples: Gamma(runs, samples, memory=False),
    "gamma, mean": Gamma,
    "gamma, sampled": lambda runs, samples: Gamma(runs, samples, sampled=True),
    "gamma, lagged": lambda runs, samples: Gamma(runs, samples, mode="lagged"),
}
