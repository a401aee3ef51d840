"""Simulated pairs that share a latent, and what of it two linear encoders have recovered.

    z ~ N(0, 1) (LATENT,),   x = z A + noise * e,   y = z B + noise * e',   A, B with orthogonal rows of equal norm

All runs of an experiment share one data set and differ in the encoders' start, so that a run is an initialisation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LATENT, WIDTH = 8, 16
SCALES = 2.0 ** torch.arange(-6, 2.01, 0.25)  # times the trained scale, where the best one is looked for


class Outcome(NamedTuple):
    """What a run reached, (runs,) each."""

    recovery: Tensor  # mean canonical correlation with the latent over that of the best linear encoders; optimum 1
    loss: Tensor  # InfoNCE over all pairs at the trained scale, nats
    best_loss: Tensor  # the same at the best of SCALES
    recall: Tensor  # share of pairs that rank first among all, mean of both directions
    held_out_recall: Tensor  # the same among as many pairs that training never saw


class Problem:
    """samples pairs and as many held-out ones, and the encoders' starts of `runs` runs."""

    def __init__(self, runs: int, samples: int, noise: float, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.runs, self.samples, self.noise = runs, samples, noise
        self.mixing = [
            torch.linalg.qr(torch.randn(WIDTH, LATENT, generator=generator))[0].T * (WIDTH / LATENT) ** 0.5
            for _ in range(2)
        ]
        self.pairs, self.held_out = self._draw(generator), self._draw(generator)
        self.start = torch.randn(2, runs, WIDTH, LATENT, generator=generator) / WIDTH**0.5

    def outcome(self, encoders: Tensor, scale: float) -> Outcome:
        """Of trained encoders (2, runs, WIDTH, LATENT)."""
        logits = scale * cosines(self.pairs, encoders)
        losses = torch.stack([_info_nce(factor * logits) for factor in SCALES.tolist()])
        held_out = cosines(self.held_out, encoders)
        return Outcome(self.recovery(encoders), _info_nce(logits), losses.amin(0), _recall(logits), _recall(held_out))

    def recovery(self, encoders: Tensor) -> Tensor:
        """(runs,), of the population: covariances are known exactly, float64."""
        ratios = []
        for mixing, encoder in zip(self.mixing, encoders.double(), strict=True):
            with_latent = mixing.double().T
            covariance = with_latent @ with_latent.T + self.noise**2 * torch.eye(WIDTH, dtype=torch.float64)
            best = torch.linalg.solve(covariance, with_latent)
            reached = canonical_correlations(encoder, covariance, with_latent)
            ratios.append(reached.mean(-1) / canonical_correlations(best, covariance, with_latent).mean())
        return torch.stack(ratios).mean(0)

    def _draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        latent = torch.randn(self.samples, LATENT, generator=generator)
        x, y = (
            latent @ mixing + self.noise * torch.randn(self.samples, WIDTH, generator=generator)
            for mixing in self.mixing
        )
        return x, y


def embed(sides: tuple[Tensor, Tensor], encoders: Tensor) -> list[Tensor]:
    """Unit rows of both sides, (runs, rows, LATENT)."""
    return [F.normalize(side @ encoder, dim=-1) for side, encoder in zip(sides, encoders, strict=True)]


def cosines(sides: tuple[Tensor, Tensor], encoders: Tensor) -> Tensor:
    x, y = embed(sides, encoders)
    return x @ y.mT


def canonical_correlations(encoder: Tensor, covariance: Tensor, with_latent: Tensor) -> Tensor:
    """Between encoder^T x and a latent of unit covariance: (..., LATENT) from (..., WIDTH, LATENT)."""
    root = torch.linalg.cholesky(encoder.mT @ covariance @ encoder)
    return torch.linalg.svdvals(torch.linalg.solve_triangular(root, encoder.mT @ with_latent, upper=False))


def _info_nce(logits: Tensor) -> Tensor:
    positives = logits.diagonal(dim1=1, dim2=2)
    return ((logits.logsumexp(1) + logits.logsumexp(2)) / 2 - positives).mean(1)


def _recall(scores: Tensor) -> Tensor:
    own = torch.arange(scores.shape[-1])
    return ((scores.argmax(1) == own).float() + (scores.argmax(2) == own).float()).mean(1) / 2
