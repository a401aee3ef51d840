"""Estimates of log-normalisers that outlive a batch.

The gamma loss weighs a pair by exp(s_ij - log Z_i), where Z_i sums over all samples and a batch shows a few. A
Normalizer says what log Z_i is believed to be; the loss asks for estimates and reports what its batch found.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from contrastile.distributed import Group, RowShare

UPDATE_RATE = 0.9


class PairBatch(NamedTuple):
    """The batch that a step scores, and what its log-normalisers stand for."""

    x: Tensor  # (B, D)
    y: Tensor  # (B, D)
    scale: float | Tensor
    samples: Tensor | None  # (B,) int64: rows of equal entry are one sample
    symmetric: bool
    virtual_batch: int  # samples that the batch stands for: Z sums over as many pairs
    backend: str | None
    share: RowShare | None = None  # of a batch over several processes: x, y and samples are this one's rows

    @property
    def total(self) -> int:
        """Rows of the batch, of all processes."""
        return self.x.shape[0] if self.share is None else self.share.total

    @property
    def group(self) -> Group | None:
        return None if self.share is None else self.share.member.group

    @property
    def exchange(self) -> str | None:
        return None if self.share is None else self.share.exchange

    @property
    def groups(self) -> tuple[Tensor, Tensor] | None:
        return None if self.samples is None else (self.samples, self.samples)

    @property
    def fixed_scale(self) -> float | Tensor:
        """The scale without its graph."""
        return self.scale.detach() if isinstance(self.scale, Tensor) else self.scale

    @property
    def log_multiplier(self) -> float:
        """Log of how many negatives each negative of the batch stands for."""
        negatives = self.total - 1
        return math.log((self.virtual_batch - 1) / negatives) if negatives > 0 else 0.0

    @property
    def log_count(self) -> float:
        return math.log(self.virtual_batch)

    @property
    def log_negatives(self) -> float:
        return math.log(self.virtual_batch - 1)


class Normalizer(Protocol):
    """What the gamma loss needs. Neither call may wait for the device, or have shapes that depend on values.

    Over a group of processes, `update` is given the values of all of them, in the same order everywhere, beside this
    process's rows of the batch: what is remembered stays the same in all.

    One whose attribute `needs_index` is False trains without an index too: then every row is a sample of its own, and
    index is arange(B). One whose attribute `by_sample` is False has no entry a sample: then an index tells equal
    samples apart, and may be any integers.
    """

    def estimate(self, index: Tensor, batch: PairBatch) -> tuple[Tensor, Tensor | None]:
        """log Z of rows and of columns of the samples `index` (B,), (B,) each; -inf where nothing is known yet.

        The second is None for a loss over rows only.
        """

    def update(self, index: Tensor, row_lse: Tensor, col_lse: Tensor | None, batch: PairBatch) -> None:
        """Takes in what the batch `index` (B,) found, (B,) each. An index may occur more than once.

        Where it is that of all rows there were no negatives to sum over, and row_lse and col_lse are NaN.
        """

    def stats(self) -> dict[str, Tensor]:
        """Numbers to log, each ()."""


class Float32State(nn.Module):
    """Keeps its floating-point buffers in float32, whatever the model around it is cast to or loads.

    `model.half()` reaches the buffers of its losses too, and 16 bits would stop a slow average from moving.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32State:
        return super()._apply(same_dtype(fn), recurse)  # type: ignore[no-untyped-call, no-any-return]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[no-untyped-call]
        for name, buffer in self.named_buffers(recurse=False):  # assign=True has put those of the state here
            if buffer.is_floating_point():
                setattr(self, name, buffer.float())


class BatchLogNormalizer(nn.Module):
    """Remembers nothing: log Z is the batch's own, each negative counted as often as the samples it stands for.

    For streams without an index, and the control that tells what a memory adds. Mode "mixed" only: with "lagged" every
    visit is a first one, and costs its fourth product.
    """

    needs_index = False
    by_sample = False

    def estimate(self, index: Tensor, batch: PairBatch) -> tuple[Tensor, Tensor | None]:
        """-inf: unknown, so that the loss takes what the batch has."""
        unknown = torch.full(index.shape, -torch.inf, dtype=torch.float32, device=index.device)
        return unknown, unknown if batch.symmetric else None

    def update(self, index: Tensor, row_lse: Tensor, col_lse: Tensor | None, batch: PairBatch) -> None:
        """Nothing is kept."""

    def stats(self) -> dict[str, Tensor]:
        """None."""
        return {}


class LogNormalizerMemory(Float32State):
    """One moving average of Z per sample and direction, kept as its logarithm:

        log Z  <-  log( (1 - rate) Z + rate Z_batch )

    The first visit takes the batch's value. A sample that occurs several times in a batch takes the mean of its
    Z_batch. Values that are not finite, as an overflow in the encoder or a batch of equal samples leaves them, are not
    taken in, but counted.
    Moving averages of normalisers: Yuan et al., "Provable stochastic optimization for global contrastive learning",
    ICML 2022; in the log domain, and with duplicates, derived here.

    Kept is the level (log Z - log count) / scale, the log-mean-exp of the dot products: of first order in a change of
    the scale, log Z moves in proportion, so an entry serves at a temperature other than that of its visit (derived;
    log Z is convex in the scale and log count at 0, so that the estimate errs upwards where the scale falls, and
    downwards where it rises).

    Buffers, float32 whatever dtype the module is cast to or loads: 4 bytes a sample and direction.
        level (2, num_samples), rows and columns, or (1, num_samples); -inf before the first visit.
        visits (), rejected () int64: values taken in and values not taken in, of all samples together.

    Args:
        num_samples: number of samples that indices run over.
        update_rate: share of the batch in the average, in (0, 1].
        columns: keep log-normalisers of columns too.

    Raises:
        ValueError: num_samples is below 1 or update_rate outside (0, 1].
    """

    level: Tensor
    visits: Tensor
    rejected: Tensor

    def __init__(self, num_samples: int, *, update_rate: float = UPDATE_RATE, columns: bool = True) -> None:
        super().__init__()
        check_count(num_samples)
        if not 0 < update_rate <= 1:
            raise ValueError(f"update_rate is {update_rate}: expected a number above 0, at most 1")
        self.num_samples = num_samples
        self.update_rate = update_rate
        sides = 2 if columns else 1
        self.register_buffer("level", torch.full((sides, num_samples), -torch.inf, dtype=torch.float32))
        self.register_buffer("visits", torch.zeros((), dtype=torch.int64))
        self.register_buffer("rejected", torch.zeros((), dtype=torch.int64))

    def estimate(self, index: Tensor, batch: PairBatch) -> tuple[Tensor, Tensor | None]:
        """As of the last update, at the batch's scale: see `Normalizer`. Index (B,) int64 within num_samples."""
        known = self._log_z(self._recall(index, batch), batch)
        return known[0], known[1] if len(known) == 2 else None

    @torch.no_grad()
    def update(self, index: Tensor, row_lse: Tensor, col_lse: Tensor | None, batch: PairBatch) -> None:
        """Takes in a batch: see `Normalizer`.

        Raises:
            ValueError: col_lse is given to a memory without columns, or missing from one with them.
        """
        if (col_lse is None) != (len(self.level) == 1):
            wanted = "no col_lse" if len(self.level) == 1 else "row_lse and col_lse"
            raise ValueError(f"this memory keeps {len(self.level)} log-normaliser(s) per sample: expected {wanted}")
        found = row_lse[None] if col_lse is None else torch.stack([row_lse, col_lse])
        found = log_mean_of_equals(index, found.to(self.level.dtype))
        old = self._recall(index, batch)
        moved = self._moved(self._log_z(old, batch), found)
        level = (torch.where(old == -torch.inf, found, moved) - batch.log_count) / batch.fixed_scale
        usable = (found.isfinite() & level.isfinite()).all(0)
        # Equal indices carry equal values by now, so the order of these writes does not matter.
        self._keep(index, torch.where(usable, level.to(old.dtype), old))
        self.visits.add_(usable.sum())
        self.rejected.add_((~usable).sum())

    def _recall(self, index: Tensor, batch: PairBatch) -> Tensor:
        """Levels of the samples `index` (B,), (sides, B)."""
        return self.level[:, index]

    def _keep(self, index: Tensor, level: Tensor) -> None:
        self.level.index_copy_(1, index, level)

    def _moved(self, log_z: Tensor, found: Tensor) -> Tensor:
        """log Z of known samples after a visit that found `found`, (sides, B) each."""
        kept_share = math.log1p(-self.update_rate) if self.update_rate < 1 else -math.inf
        return torch.logaddexp(log_z + kept_share, found + math.log(self.update_rate))

    def _log_z(self, level: Tensor, batch: PairBatch) -> Tensor:
        log_z = (level * batch.fixed_scale).to(level.dtype) + batch.log_count
        return torch.where(level == -torch.inf, level, log_z)

    def stats(self) -> dict[str, Tensor]:
        """seen: share of samples visited; visits: their mean number; rejected: values not taken in. All ()."""
        seen = (self.level[0] > -torch.inf).float().mean()
        return {"seen": seen, "visits": self.visits / self.num_samples, "rejected": self.rejected.clone()}

    def extra_repr(self) -> str:
        return f"num_samples={self.num_samples}, update_rate={self.update_rate}, columns={len(self.level) == 2}"


class StochasticLogNormalizerMemory(LogNormalizerMemory):
    """The log-weight v = -log Z of a sample by stochastic approximation, in place of an average of Z:

        v  <-  v - rate (exp(v) Z_batch - 1)

    a step down the slope of v's bound, exp(v) Z - v - 1. At rest E exp(v) = 1 / Z, so that weights are right on
    average, where the inverse of an averaged Z is too large on average (Jensen); derived here. No step leads past
    Z_batch, which only steps from a Z_batch many times Z would. Use mode="lagged" and cap=False: a weight that takes
    its own batch in, or is capped, is not right on average. A sample's log Z falls by `rate` nats a visit at most, so
    that it lags behind encoders that move.

    Buffers, arguments and errors: as `LogNormalizerMemory`.
    """

    def _moved(self, log_z: Tensor, found: Tensor) -> Tensor:
        gap = found - log_z
        step = self.update_rate * torch.expm1(gap)
        return log_z + torch.where(gap > 0, step.minimum(gap), step.maximum(gap))


def check_count(num_samples: int) -> None:
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}: expected at least 1")


def same_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `fn` does to a tensor's device alone."""

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move


def log_mean_of_equals(index: Tensor, values: Tensor) -> Tensor:
    """At each position, the log of the mean of exp(values) over all positions with the same index.

    index (B,), values (sides, B) -> (sides, B).
    """
    run_of = _runs_of_equals(index).expand_as(values)
    top = torch.full_like(values, -torch.inf).scatter_reduce(1, run_of, values, "amax").gather(1, run_of)
    return top + (_sums(run_of, (values - top).exp()) / _sums(run_of, torch.ones_like(values))).log()


def mean_of_equals(index: Tensor, values: Tensor) -> Tensor:
    """At each position, the mean of values over all positions with the same index: (B,), (sides, B) -> (sides, B)."""
    run_of = _runs_of_equals(index).expand_as(values)
    return _sums(run_of, values) / _sums(run_of, torch.ones_like(values))


def count_of_equals(index: Tensor) -> Tensor:
    """At each position, how many have the same index: (B,) -> (B,) int64."""
    return _sums(_runs_of_equals(index)[None], torch.ones_like(index)[None])[0]


def _runs_of_equals(index: Tensor) -> Tensor:
    """A number below B for each distinct index, (B,). Sorting and numbering the runs keeps every shape static."""
    ordered, order = index.sort(stable=True)
    run = torch.zeros_like(index)
    run[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    return torch.zeros_like(index).scatter(0, order, run)


def _sums(run_of: Tensor, values: Tensor) -> Tensor:
    """At each position, the sum of values over its run: (sides, B) each."""
    return torch.zeros_like(values).scatter_add(1, run_of, values).gather(1, run_of)
