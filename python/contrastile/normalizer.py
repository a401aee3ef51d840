"""Estimates of log-normalisers that outlive a batch.

The gamma loss weighs a pair by exp(s_ij - log Z_i), where Z_i sums over all samples and a batch shows a few. A
Normalizer says what log Z_i is believed to be; the loss asks for estimates and reports what its batch found.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn


class Normalizer(Protocol):
    """What the gamma loss needs. Neither call may wait for the device, or have shapes that depend on values."""

    def estimate(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """log Z of rows and of columns of the samples `index` (B,), (B,) each; -inf where nothing is known yet.

        The second is None for a loss over rows only.
        """

    def update(self, index: Tensor, row_lse: Tensor, col_lse: Tensor | None) -> None:
        """Takes in what the batch `index` (B,) found, (B,) each. An index may occur more than once."""

    def stats(self) -> dict[str, Tensor]:
        """Numbers to log, each ()."""


class LogNormalizerMemory(nn.Module):
    """One moving average of Z per sample and direction, kept as its logarithm:

        log Z  <-  log( (1 - rate) Z + rate Z_batch )

    The first visit takes the batch's value. A sample that occurs several times in a batch takes the mean of its
    Z_batch. Values that are not finite, as an overflow in the encoder leaves them, are not taken in, but counted.
    Moving averages of normalisers: Yuan et al., "Provable stochastic optimization for global contrastive learning",
    ICML 2022; in the log domain, and with duplicates, derived here.

    Buffers, float32 whatever dtype the module is cast to:
        log_z (2, num_samples), rows and columns, or (1, num_samples); -inf before the first visit.
        visits (num_samples,) int64: batches taken in. rejected () int64: values not taken in.

    Args:
        num_samples: number of samples that indices run over.
        update_rate: share of the batch in the average, in (0, 1].
        columns: keep log-normalisers of columns too.

    Raises:
        ValueError: num_samples is below 1 or update_rate outside (0, 1].
    """

    log_z: Tensor
    visits: Tensor
    rejected: Tensor

    def __init__(self, num_samples: int, *, update_rate: float = 0.7, columns: bool = True) -> None:
        super().__init__()
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}: expected at least 1")
        if not 0 < update_rate <= 1:
            raise ValueError(f"update_rate is {update_rate}: expected a number above 0, at most 1")
        self.num_samples = num_samples
        self.update_rate = update_rate
        self.register_buffer("log_z", torch.full((2 if columns else 1, num_samples), -torch.inf))
        self.register_buffer("visits", torch.zeros(num_samples, dtype=torch.int64))
        self.register_buffer("rejected", torch.zeros((), dtype=torch.int64))

    def estimate(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """As of the last update: see `Normalizer`. Index (B,) int64 within num_samples."""
        known = self.log_z[:, index]
        return known[0], known[1] if len(known) == 2 else None

    @torch.no_grad()
    def update(self, index: Tensor, row_lse: Tensor, col_lse: Tensor | None = None) -> None:
        """Takes in a batch: see `Normalizer`.

        Raises:
            ValueError: col_lse is given to a memory without columns, or missing from one with them.
        """
        if (col_lse is None) != (len(self.log_z) == 1):
            wanted = "no col_lse" if len(self.log_z) == 1 else "row_lse and col_lse"
            raise ValueError(f"this memory keeps {len(self.log_z)} log-normaliser(s) per sample: expected {wanted}")
        batch = row_lse[None] if col_lse is None else torch.stack([row_lse, col_lse])
        batch = log_mean_of_equals(index, batch.to(self.log_z.dtype))
        old, visits = self.log_z[:, index], self.visits[index]
        kept_share = math.log1p(-self.update_rate) if self.update_rate < 1 else -math.inf
        moved = torch.logaddexp(old + kept_share, batch + math.log(self.update_rate))
        usable = batch.isfinite().all(0)
        new = torch.where(usable, torch.where(visits == 0, batch, moved), old)
        # Equal indices carry equal values by now, so the order of these writes does not matter.
        self.log_z.index_copy_(1, index, new)
        self.visits.index_copy_(0, index, visits + usable)
        self.rejected.add_((~usable).sum())

    def stats(self) -> dict[str, Tensor]:
        """seen: share of samples visited; visits: their mean number; rejected: values not taken in. All ()."""
        visits = self.visits.float()
        return {"seen": (visits > 0).float().mean(), "visits": visits.mean(), "rejected": self.rejected.clone()}

    def extra_repr(self) -> str:
        return f"num_samples={self.num_samples}, update_rate={self.update_rate}, columns={len(self.log_z) == 2}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LogNormalizerMemory:
        # `model.half()` reaches the buffers of its losses too, and 16 bits would stop a slow average from moving.
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)  # type: ignore[no-untyped-call, no-any-return]


def log_mean_of_equals(index: Tensor, values: Tensor) -> Tensor:
    """At each position, the log of the mean of exp(values) over all positions with the same index.

    index (B,), values (sides, B) -> (sides, B). Sorting and numbering the runs keeps every shape static.
    """
    ordered, order = index.sort(stable=True)
    run = torch.zeros_like(index)
    run[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    run_of = torch.zeros_like(index).scatter(0, order, run).expand_as(values)
    top = torch.full_like(values, -torch.inf).scatter_reduce(1, run_of, values, "amax")
    total = torch.zeros_like(values).scatter_add(1, run_of, (values - top.gather(1, run_of)).exp())
    count = torch.zeros_like(values).scatter_add(1, run_of, torch.ones_like(values))
    return (top + (total / count).log()).gather(1, run_of)
