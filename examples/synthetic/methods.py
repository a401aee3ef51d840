"""Losses as the coefficients dL/ds_ij of many runs at once.

A run of this size is a few microseconds of arithmetic, so all runs of an experiment share one step. What is learned
from one step to the next is the package's own: its memories, its draws, one entry a run and sample. Only the pairs,
(runs, B, B) logits, are written densely here, and the tests hold them to the losses of the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from contrastile.draws import GammaDraws
from contrastile.normalizer import BatchLogNormalizer, LogNormalizerMemory, Normalizer, PairBatch
from torch import Tensor


class Step(NamedTuple):
    """What one step of all runs shows a method."""

    sides: tuple[Tensor, Tensor]  # (B, WIDTH) each
    encoders: Tensor  # (2, runs, WIDTH, LATENT)
    embedded: Tensor  # (2, runs, B, LATENT), unit rows
    index: Tensor  # (B,) sample numbers
    scale: float


class Method(Protocol):
    """One loss, with what it remembers of `runs` runs over `samples` samples each."""

    def gradients(self, step: Step) -> Tensor:
        """Of each run's summed loss over the rows, with respect to step.embedded."""


class OfPairs:
    """A loss of the batch's own pairs."""

    def gradients(self, step: Step) -> Tensor:
        x, y = step.embedded
        coefficients = self.coefficients(step.scale * (x @ y.mT), step.index, step.scale) * step.scale
        return torch.stack([coefficients @ y, coefficients.mT @ x])

    def coefficients(self, logits: Tensor, index: Tensor, scale: float) -> Tensor:
        """dL/ds of each run's summed loss, (runs, B, B), for logits of that shape and sample numbers index (B,)."""
        raise NotImplementedError


class InfoNCE(OfPairs):
    def coefficients(self, logits: Tensor, index: Tensor, scale: float) -> Tensor:
        return (logits.softmax(1) + logits.softmax(2)) / 2 - identity(logits)


class DCL(OfPairs):
    """Without the positive in the denominator: Yeh et al., "Decoupled contrastive learning", ECCV 2022."""

    def coefficients(self, logits: Tensor, index: Tensor, scale: float) -> Tensor:
        negatives = logits.masked_fill(identity(logits).bool(), -torch.inf)
        return (negatives.softmax(1) + negatives.softmax(2)) / 2 - identity(logits)


class Gamma(OfPairs):
    """GammaContrastiveLoss; a normaliser, if given, has an entry a run and sample."""

    def __init__(
        self,
        runs: int,
        samples: int,
        *,
        mode: str = "mixed",
        normalizer: LogNormalizerMemory | BatchLogNormalizer | None = None,
        sampled: bool = False,
    ) -> None:
        self.memory = Remembered(normalizer or LogNormalizerMemory(runs * samples), samples)
        self.samples, self.mode = samples, mode
        self.draws = GammaDraws(generator=torch.Generator().manual_seed(0)) if sampled else None

    def coefficients(self, logits: Tensor, index: Tensor, scale: float) -> Tensor:
        logits, found = self._of_all_samples(logits)
        if self.mode == "mixed":
            self.memory.update(found, index, scale)
        believed = self.memory.estimate(found, index, scale)
        if self.mode == "lagged":
            self.memory.update(found, index, scale)
        return self._weights(logits, believed)

    def _of_all_samples(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits with their multiplier, and the log-normalisers of both directions, (2, runs, B)."""
        log_multiplier = math.log((self.samples - 1) / (logits.shape[-1] - 1))
        logits = logits + log_multiplier * (1 - identity(logits))
        return logits, torch.stack([logits.logsumexp(2), logits.logsumexp(1)])

    def _weights(self, logits: Tensor, believed: Tensor) -> Tensor:
        exponents = torch.stack([logits - believed[0][:, :, None], logits - believed[1][:, None, :]])
        if self.mode == "lagged":
            exponents = exponents.clamp(max=0)
        rows, cols = exponents.exp()
        if self.draws is not None:
            row_draws, col_draws = self.draws(believed.numel()).view_as(believed)
            rows, cols = rows * row_draws[:, :, None], cols * col_draws[:, None, :]
        return (rows + cols) / 2 - identity(logits)


class GammaByEmbedding(Gamma):
    """GammaContrastiveLoss in mode "lagged" whose normaliser, one a run, looks at embeddings."""

    def __init__(self, runs: int, samples: int, normalizer: Callable[[], Normalizer]) -> None:
        super().__init__(runs, samples, mode="lagged", normalizer=BatchLogNormalizer())
        self.normalizers = [normalizer() for _ in range(runs)]

    def gradients(self, step: Step) -> Tensor:
        x, y = step.embedded
        logits, found = self._of_all_samples(step.scale * (x @ y.mT))
        batches = [PairBatch(*run, step.scale, step.index, True, self.samples, None) for run in step.embedded.unbind(1)]
        known = [
            torch.stack(each.estimate(step.index, batch)) for each, batch in zip(self.normalizers, batches, strict=True)
        ]
        for each, run, batch in zip(self.normalizers, found.unbind(1), batches, strict=True):
            each.update(step.index, *run, batch)
        believed = torch.stack(known, 1)
        coefficients = self._weights(logits, torch.where(believed == -torch.inf, found, believed)) * step.scale
        return torch.stack([coefficients @ y, coefficients.mT @ x])


class Remembered:
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


def identity(logits: Tensor) -> Tensor:
    return torch.eye(logits.shape[-1])
