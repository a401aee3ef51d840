"""Log-normalisers taken afresh from embeddings of more samples than the batch has, by a statistics sweep a side."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from contrastile.functional import log_normalizers
from contrastile.normalizer import Float32State, PairBatch

Sides = tuple[Tensor, Tensor]


class ExactLogNormalizer(nn.Module):
    """log Z over all samples, swept at every step: the truth that other normalisers estimate.

    With mode="lagged", cap=False the gradient of the gamma loss is then unbiased; two sweeps of B x n pairs a step
    make it an oracle for small data sets, not a way to train.

    Args:
        embeddings: gives the present embeddings of all samples, (n, D) each, in the order of their indices.
    """

    def __init__(self, embeddings: Callable[[], Sides]) -> None:
        super().__init__()
        self.embeddings = embeddings

    @torch.no_grad()
    def estimate(self, index: Tensor, batch: PairBatch) -> tuple[Tensor, Tensor | None]:
        """At the embeddings of this moment: see `contrastile.normalizer.Normalizer`."""
        x, y = self.embeddings()
        return _swept(batch, (x, y), torch.arange(len(y), device=y.device), index, index)

    def update(self, index: Tensor, row_lse: Tensor, col_lse: Tensor | None, batch: PairBatch) -> None:
        """Nothing is kept."""

    def stats(self) -> dict[str, Tensor]:
        """None."""
        return {}


class QueueLogNormalizer(Float32State):
    """log Z over the batch and the last `capacity` embeddings that training saw, without an entry a sample.

    For streams whose samples come once, or have no stable index; index then tells equal samples apart, and may be any
    integers: num_samples is what Z stands for. Two sweeps of B x (B + capacity) pairs a step; the entries are as
    old as the steps that wrote them. Use mode="lagged", which on a CPU sweeps the batch no second time. Until the queue
    has been filled its first batch stands in for what is missing. Queues of embeddings: He et al., "Momentum contrast",
    CVPR 2020; as a source of the normaliser alone, derived here.

    Buffers, float32 whatever dtype the module is cast to or loads:
        entries (2, capacity, dim), of rows and of columns.
        samples (capacity,) int64. position () int64: the next to be overwritten. written () int64: taken in so far.

    Args:
        capacity: number of embeddings kept of each side.
        dim: their width D.

    Raises:
        ValueError: capacity or dim is below 1.
    """

    by_sample = False

    entries: Tensor
    samples: Tensor
    position: Tensor
    written: Tensor

    def __init__(self, capacity: int, dim: int) -> None:
        super().__init__()
        if capacity < 1 or dim < 1:
            raise ValueError(f"capacity is {capacity} and dim {dim}: expected at least 1 each")
        self.register_buffer("entries", torch.zeros(2, capacity, dim, dtype=torch.float32))
        self.register_buffer("samples", torch.full((capacity,), -1, dtype=torch.int64))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def estimate(self, index: Tensor, batch: PairBatch) -> tuple[Tensor, Tensor | None]:
        """Over batch and queue: see `contrastile.normalizer.Normalizer`.

        Raises:
            ValueError: the embeddings are not of the queue's width.
        """
        self._check(batch)
        rows = len(index)
        own = torch.stack([batch.x, batch.y]).to(self.entries.dtype)
        entries, samples = self._held(own, index)
        x, y = torch.cat([own, entries], 1).to(batch.x.dtype)
        return _swept(batch, (x, y), torch.cat([index, samples]), index, torch.arange(rows, device=index.device))

    @torch.no_grad()
    def update(self, index: Tensor, row_lse: Tensor, col_lse: Tensor | None, batch: PairBatch) -> None:
        """Takes in the batch's embeddings in place of the oldest ones; of a batch above capacity, the last ones.

        Raises:
            ValueError: the embeddings are not of the queue's width.
        """
        self._check(batch)
        capacity = len(self.samples)
        own = torch.stack([batch.x, batch.y]).to(self.entries.dtype)[:, -capacity:]
        index = index[-capacity:]
        entries, samples = self._held(own, index)
        slots = (self.position + torch.arange(len(index), device=index.device)) % capacity
        self.entries.copy_(entries.index_copy(1, slots, own))
        self.samples.copy_(samples.index_copy(0, slots, index))
        self.position.copy_((self.position + len(index)) % capacity)
        self.written.add_(len(index))

    def stats(self) -> dict[str, Tensor]:
        """filled: share of the queue that training has written. ()."""
        return {"filled": (self.written / len(self.samples)).clamp(max=1)}

    def _held(self, own: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Entries and their samples: copies of a first batch where nothing has been written."""
        copies = torch.arange(len(self.samples), device=index.device) % len(index)
        filled = self.written > 0
        entries = torch.where(filled, self.entries, own[:, copies])
        return entries, torch.where(filled, self.samples, index[copies])

    def _check(self, batch: PairBatch) -> None:
        dim = self.entries.shape[2]
        if batch.x.shape[1] != dim:
            raise ValueError(f"x is {tuple(batch.x.shape)}, the queue keeps rows of {dim}: expected (B, {dim})")


def _swept(
    batch: PairBatch, sides: Sides, samples: Tensor, index: Tensor, positives: Tensor
) -> tuple[Tensor, Tensor | None]:
    """log Z of the batch's anchors over candidates `sides`, whose samples are `samples`, as of virtual_batch pairs."""
    negatives = len(samples) - 1
    log_multiplier = math.log((batch.virtual_batch - 1) / negatives) if negatives > 0 else 0.0

    def over(anchors: Tensor, candidates: Tensor) -> Tensor:
        return log_normalizers(
            anchors.detach(),
            candidates,
            batch.fixed_scale,
            positives=positives,
            groups=(index, samples),
            columns=False,
            log_multiplier=log_multiplier,
            backend=batch.backend,
        )[0]

    return over(batch.x, sides[1]), over(batch.y, sides[0]) if batch.symmetric else None
