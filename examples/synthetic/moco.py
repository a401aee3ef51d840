"""InfoNCE against a queue of keys from momentum encoders, across two modalities."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.synthetic.methods import Step
from examples.synthetic.problem import embed


class MoCo:
    """Each side queries the other's keys: its own positive, and as negatives `capacity` keys of earlier batches.

    He et al., "Momentum contrast for unsupervised visual representation learning", CVPR 2020: no gradient into keys,
    none of the batch's other keys as negatives, random unit vectors in the queue at the start, key encoders moved
    before they encode. Their momentum is 0.999 for runs of a million steps; 0.99 suits those of this example.
    """

    def __init__(self, runs: int, *, capacity: int = 256, momentum: float = 0.99) -> None:
        self.runs, self.capacity, self.momentum = runs, capacity, momentum
        self.encoders: Tensor | None = None
        self.queue: Tensor | None = None  # (2, runs, capacity, LATENT), oldest first

    def gradients(self, step: Step) -> Tensor:
        queries = step.embedded
        if self.encoders is None or self.queue is None:
            self.encoders = step.encoders.detach().clone()
            noise = torch.randn(
                2, self.runs, self.capacity, queries.shape[-1], generator=torch.Generator().manual_seed(0)
            )
            self.queue = F.normalize(noise.to(queries.dtype), dim=-1)
        self.encoders = torch.lerp(step.encoders.detach(), self.encoders, self.momentum)
        keys = torch.stack(embed(step.sides, self.encoders))
        others = keys.flip(0), self.queue.flip(0)  # what a query of each side is compared with
        logits = torch.cat([(queries * others[0]).sum(-1, keepdim=True), queries @ others[1].mT], -1)
        weights = (step.scale * logits).softmax(-1)
        pulled = (weights[..., :1] - 1) * others[0] + weights[..., 1:] @ others[1]
        self.queue = torch.cat([self.queue, keys], 2)[:, :, -self.capacity :]
        return pulled * step.scale / 2
