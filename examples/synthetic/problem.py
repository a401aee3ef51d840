"""Simulated pairs that share a latent, and what of it two linear encoders have recovered.

    z ~ N(0, 1) (LATENT,),   x = z A + noise * e,   y = z B + noise * e',   A, B with orthogonal rows of equal norm

All runs of an experiment share one data set and differ in the encoders' start, so that a run is an initialisation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from contrastile import info_nce, recall_at_k, retrieval_ranks
from torch import Tensor
from torch.nn import functional as F

LATENT, WIDTH = 8, 16
SCALES = 2.0 ** torch.arange(-6, 2.01, 0.5)  # times the trained scale, where the best one is looked for
EVALUATED = 2048  # pairs at most among which a run is scored


class Outcome(NamedTuple):
    """What a run reached, (runs,) each."""

    recovery: Tensor  # mean canonical correlation with the latent over that of the best linear encoders; optimum 1
    loss: Tensor  # InfoNCE over all pairs, EVALUATED at most, at the trained scale, nats
    best_loss: Tensor  # the same at the best of SCALES
    recall: Tensor  # share of those pairs that rank first among them, mean of both directions
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
        seen, held_out = (
            list(zip(*embed((x[:EVALUATED], y[:EVALUATED]), encoders), strict=True))
            for x, y in (self.pairs, self.held_out)
        )
        losses = torch.tensor([[info_nce(*run, scale * factor) for run in seen] for factor in SCALES.tolist()])
        return Outcome(
            self.recovery(encoders),
            torch.tensor([info_nce(*run, scale) for run in seen]),
            losses.amin(0),
            torch.tensor([_recall(*run) for run in seen]),
            torch.tensor([_recall(*run) for run in held_out]),
        )

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


def canonical_correlations(encoder: Tensor, covariance: Tensor, with_latent: Tensor) -> Tensor:
    """Between encoder^T x and a latent of unit covariance: (..., LATENT) from (..., WIDTH, LATENT)."""
    root = torch.linalg.cholesky(encoder.mT @ covariance @ encoder)
    return torch.linalg.svdvals(torch.linalg.solve_triangular(root, encoder.mT @ with_latent, upper=False))


def _recall(x: Tensor, y: Tensor) -> float:
    return sum(recall_at_k(retrieval_ranks(*sides), [1])[1] for sides in ((x, y), (y, x))) / 2
