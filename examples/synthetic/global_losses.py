"""Global contrastive losses of other articles: SogCLR, iSogCLR and FastCLIP v3.

For every sample i and side, with h_ij = <x_i, y_j> - <x_i, y_i>, n - 1 negatives j and temperature tau_i:

    F_i = tau_i log( mean_j exp(h_ij / tau_i) ) + rho tau_i,      dF_i / dh_ij = w_ij = exp(h_ij / tau_i) / ((n-1) u_i)

with u_i a moving average of the batch's mean; F is the mean over samples and both sides, here times the temperature of
the start, so that gradients are of one size. dF_i / dtau_i = log u_i + rho - sum_j w_ij h_ij / tau_i: at the optimum
the weights' divergence from equal ones is rho.
"""

from __future__ import annotations

import math

import torch
from contrastile.normalizer import LogNormalizerMemory
from torch import Tensor

from examples.synthetic.methods import OfPairs, Remembered, identity


class SogCLR(OfPairs):
    """u_i <- (1 - rate) u_i + rate mean_j exp(h_ij / tau) and one temperature, which stays.

    Yuan et al., "Provable stochastic optimization for global contrastive learning", ICML 2022.
    """

    def __init__(self, runs: int, samples: int, *, rate: float = 0.9) -> None:
        self.averages = LogNormalizerMemory(runs * samples, update_rate=rate)
        self.memory = Remembered(self.averages, samples)

    def coefficients(self, logits: Tensor, index: Tensor, scale: float) -> Tensor:
        own = logits.diagonal(dim1=1, dim2=2)
        margins = torch.stack([logits - own[:, :, None], (logits - own[:, None, :]).mT])  # scale * h
        margins = margins / (self.temperatures(margins[..., 0], index, scale) * scale)[..., None]
        is_negative = ~identity(logits).bool()
        count = logits.shape[-1] - 1
        found = margins.masked_fill(~is_negative, -torch.inf).logsumexp(3) - math.log(count)
        # The articles average u as it is found, at whatever temperature: scale 1 keeps it so.
        self.memory.update(found, index, 1.0)
        log_u = self.memory.estimate(found, index, 1.0)
        weights = (margins - log_u[..., None]).exp() * is_negative / count
        self.learn(index, log_u - (weights * margins).sum(3))
        rows, cols = weights - torch.diag_embed(weights.sum(3))
        return (rows + cols.mT) / 2

    def temperatures(self, like: Tensor, index: Tensor, scale: float) -> Tensor:
        """Of the batch's samples, by side and run, (2, runs, B) as `like`."""
        return torch.full_like(like, 1 / scale)

    def learn(self, index: Tensor, slopes: Tensor) -> None:
        """Takes in dF_i / dtau_i - rho of the batch's samples, (2, runs, B). This loss has nothing to learn."""


class ISogCLR(SogCLR):
    """A temperature a sample and side: m_i <- (1 - beta) m_i + beta dF_i/dtau_i, tau_i <- tau_i - eta m_i, clipped.

    Qiu et al., "Not all semantics are created equal: contrastive self-supervised learning with automatic temperature
    individualization", ICML 2023. The article's rho of 5 and more is for batches of hundreds: the weights of 31
    negatives diverge by log 31 = 3.4 at most. Step and range are LibAUC's for two modalities, relative to the start.

    Args:
        eta, lowest, highest: in units of the temperature that the cell gives.
    """

    def __init__(
        self,
        runs: int,
        samples: int,
        *,
        rho: float = 1.0,
        eta: float = 1.0,
        lowest: float = 0.5,
        highest: float = 5.0,
        beta: float = 0.9,
        rate: float = 0.9,
    ) -> None:
        super().__init__(runs, samples, rate=rate)
        self.rho, self.eta, self.beta, self.lowest, self.highest = rho, eta, beta, lowest, highest
        self.start = math.nan
        self.relative = torch.ones(2, runs, samples, dtype=torch.float64)
        self.momentum = torch.zeros_like(self.relative)

    def temperatures(self, like: Tensor, index: Tensor, scale: float) -> Tensor:
        return (self.relative[..., index] / scale).to(like.dtype)

    def learn(self, index: Tensor, slopes: Tensor) -> None:
        momentum = (1 - self.beta) * self.momentum[..., index] + self.beta * (slopes.double() + self.rho)
        moved = self.relative[..., index] - self.eta * momentum
        self.momentum[..., index] = momentum
        self.relative[..., index] = moved.clamp(self.lowest, self.highest)


class FastCLIP(SogCLR):
    """One temperature of all samples, learned by Adam, and a rate that falls from 1 by a cosine over the epochs.

    Version 3 of Wei et al., "FastCLIP: a suite of optimization techniques to accelerate CLIP training with limited
    resources", 2024. Its code learns log(1 / tau); its step falls to a third where tau is below 0.03, and tau stays
    above 0.01. As for iSogCLR, its rho of 6.5 to 11 is beyond what the batches of this example can diverge.

    Args:
        rate: of the average from epoch `epochs` on.
        step: of Adam.
    """

    def __init__(
        self, runs: int, samples: int, *, rho: float = 1.0, rate: float = 0.2, epochs: int = 10, step: float = 2e-4
    ) -> None:
        super().__init__(runs, samples, rate=1.0)
        self.rho, self.rate, self.epochs = rho, rate, epochs
        self.samples, self.shown = samples, 0
        self.log_scale = torch.full((runs,), math.nan, dtype=torch.float64)
        self.adam = torch.optim.Adam([self.log_scale], lr=step)

    def temperatures(self, like: Tensor, index: Tensor, scale: float) -> Tensor:
        self.log_scale.nan_to_num_(math.log(scale))
        epoch = min(self.shown // self.samples, self.epochs)
        self.averages.update_rate = self.rate + (1 - self.rate) * (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        self.shown += len(index)
        return (-self.log_scale).exp().to(like.dtype)[:, None].expand_as(like)

    def learn(self, index: Tensor, slopes: Tensor) -> None:
        before = self.log_scale.clone()
        self.log_scale.grad = -(-before).exp() * (slopes.double().mean((0, 2)) + self.rho)
        self.adam.step()
        moved = self.log_scale - before
        third = torch.where((-before).exp() < 0.03, 1 / 3, 1.0)
        self.log_scale.copy_((before + third * moved).clamp(max=math.log(100)))
