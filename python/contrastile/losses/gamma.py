"""The gamma-weighted decomposable contrastive loss, with its memory, its draws and its temperature."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor, nn

from contrastile.distributed import Group, RowShare, refusals_told
from contrastile.draws import GammaDraws
from contrastile.functional import GammaOutput, gamma_contrastive, log_normalizers
from contrastile.losses.samples import check_index, check_sides
from contrastile.normalizer import LogNormalizerMemory, Normalizer, PairBatch
from contrastile.prototypes import PrototypeLogNormalizer
from contrastile.sweeping_normalizers import QueueLogNormalizer
from contrastile.validation import accumulation_dtype

MODES = ("mixed", "lagged")
DRAWS = ("gamma", "mean")
KEEPING_SIDES = (LogNormalizerMemory, PrototypeLogNormalizer)
OF_OWN_EMBEDDINGS = (PrototypeLogNormalizer, QueueLogNormalizer)  # which processes of a group do not exchange

ROUNDING = 1e-3  # a sum of weights that exceeds one by less does not count as above it

LogNormalizers = tuple[Tensor, "Tensor | None"]  # of rows and of columns, (B,) each


class GammaContrastiveLoss(nn.Module):
    """Contrastive loss over all num_samples pairs, trained from small batches with a remembered normaliser.

        L_i = -s_pos + g_i sum_j phi(s_ij - log Z_i) - log g_i + log Z_i - 1,      g_i ~ Gamma(shape) / shape

    where each negative of the batch counts (virtual_batch - 1) / (B - 1) times. An upper bound of InfoNCE with that
    multiplier, tight at the batch's own log Z_i: for any g_i without the cap, on average over g_i with it (phi and cap
    as in `gamma_contrastive`). After Chen et al., "Why do we need large batchsizes in contrastive learning?", NeurIPS
    2022; memory, modes, cap and multiplier are derived here.

    The multiplier divides by B - 1 whatever the indices: with c rows of each sample, as from repeated augmentation, a
    row has B - c negatives, and what they add to Z is low by (B - c) / (B - 1).

    mode="mixed" moves the memory towards the batch first and takes log Z from there: 4 products in both directions,
    and no weight is above 1 / update_rate before the draw. mode="lagged" takes log Z as the memory had it, which may be
    an epoch old: 3 products, and only the cap keeps it stable. A sample's first visit takes the batch's own log Z,
    which costs "lagged" a fourth product: on a CPU in batches with such a sample, elsewhere always, as asking
    would wait for the device.

    In eval mode nothing is remembered and nothing drawn: log Z is the batch's own, which makes the bound tight, and
    the value InfoNCE's with the multiplier. index may then be None. A compiled graph holds for one batch size.

    Keep the loss out of the module that DistributedDataParallel wraps, or give it group=: at every forward DDP would
    replace the memories of the other processes by rank 0's, unless it is told broadcast_buffers=False.

    Args:
        num_samples: size of the data set that indices run over, at least 2.
        init_scale: 1 / temperature, where forward is not given one.
        learnable_scale: make it a parameter, its logarithm `log_scale` (); hand it to the optimiser.
        max_scale: training holds the learned scale at this at most, as CLIP does.
        mode: "mixed" or "lagged".
        draws: "gamma" samples g_i, "mean" takes g_i = 1.
        shape: of the gamma draws, at least 1; the larger, the closer to "mean".
        update_rate: share of the batch in the remembered average, in (0, 1]; default 0.9.
        normalizer: what remembers instead of `LogNormalizerMemory(num_samples, update_rate=update_rate)`; one that
            keeps columns if and only if symmetric.
        cap: hold every weight at 1 at most; default for "lagged" only, since "mixed" is bounded without.
        symmetric: both directions, else the rows of x alone.
        virtual_batch: number of samples that a batch stands for, at least 2; default num_samples.
        generator: chooses the seed of the draws; default torch's own, so that torch.manual_seed fixes the run.
        group: process group whose processes hold the rows of a larger batch, as for `info_nce`. All of them remember
            what all of them saw, so that their memories stay equal, and seeded alike they draw as one process would.
            A learned scale is a parameter like any other, whose gradient is to be averaged.
        exchange, backend: as for `info_nce`.

    Raises:
        ValueError: an option is out of its range, or both update_rate and normalizer are given; normalizer has fewer
            entries than num_samples, or other directions than symmetric says; a group is given with a
            QueueLogNormalizer or PrototypeLogNormalizer, whose embeddings would differ between processes.
    """

    weight_sums: Tensor
    drift: Tensor

    def __init__(
        self,
        num_samples: int,
        *,
        init_scale: float = 1 / 0.07,
        learnable_scale: bool = False,
        max_scale: float = 100.0,
        mode: str = "mixed",
        draws: str = "gamma",
        shape: float = 1.0,
        update_rate: float | None = None,
        normalizer: Normalizer | None = None,
        cap: bool | None = None,
        symmetric: bool = True,
        virtual_batch: int | None = None,
        generator: torch.Generator | None = None,
        group: Group | None = None,
        exchange: str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        virtual_batch = num_samples if virtual_batch is None else virtual_batch
        _check_options(num_samples, virtual_batch, init_scale, max_scale, mode, draws)
        if normalizer is None:
            rate = {} if update_rate is None else {"update_rate": update_rate}
            normalizer = LogNormalizerMemory(num_samples, columns=symmetric, **rate)
        elif update_rate is not None:
            raise ValueError("update_rate and normalizer are both given: the rate belongs to the default normaliser")
        _check_normalizer(normalizer, num_samples, symmetric, group)
        self.num_samples = num_samples
        self.init_scale = init_scale
        self.max_scale = max_scale
        self.log_scale = nn.Parameter(torch.tensor(math.log(init_scale))) if learnable_scale else None
        self.mode = mode
        self.normalizer = normalizer
        self.draws = GammaDraws(shape, generator=generator) if draws == "gamma" else None
        self.cap = mode == "lagged" if cap is None else cap
        self.symmetric = symmetric
        self.virtual_batch = virtual_batch
        self.group = group
        self.exchange = exchange
        self.backend = backend
        self.register_buffer("weight_sums", torch.zeros(2, dtype=torch.int64))  # above one, all
        self.register_buffer("drift", torch.zeros((), dtype=torch.float32))

    def forward(self, x: Tensor, y: Tensor, index: Tensor | None, scale: float | Tensor | None = None) -> Tensor:
        """The bound, (), float32, or float64 for float64 inputs.

        Two rows of equal index are one sample, hence no negatives of each other. A batch of one sample, in one row or
        several, has no negatives: it is scored with what the memory knows, and not remembered.

        Args:
            x, y: the two sides of B pairs, (B, D) each, used as given: normalise them first.
            index: which samples these are, (B,) integers from 0 to num_samples - 1, or any with a normaliser that has
                no entry a sample. May be None with one that needs none, except over a group: then all rows are samples
                of their own.
            scale: 1 / temperature, a number or a tensor () that gets its gradient; default the loss's own.

        Raises:
            ValueError: x and y differ in rows; index has another length, or leaves its range (looked at on a CPU
                only); index is missing in training; a scale is given to a loss that learns its own.
            TypeError: index holds no integers.
            ValueError, TypeError, RuntimeError: as `gamma_contrastive` does.
        """
        with nullcontext() if self.group is None else refusals_told(self.group):
            index = self._checked(x, y, index)
            scale = self._scale(scale)
        share = None if self.group is None else self._share(x.shape[0], index)
        batch = PairBatch(x, y, scale, index, self.symmetric, self.virtual_batch, self.backend, share)
        if index is None or not self.training:
            return _bound(batch, _log_normalizers(batch)).loss

        samples = index if share is None else share.gathered(index)
        has_negatives = (samples != samples[:1]).any()
        if self.mode == "mixed":
            found = _log_normalizers(batch)
            self._remember(found, samples, has_negatives, batch)
            believed = _filled(self.normalizer.estimate(index, batch), found)
            loss = _bound(batch, believed, self.cap, *self._draw(batch)).loss
        else:
            believed = _with_first_visits(self.normalizer.estimate(index, batch), batch)
            loss, row_lse, col_lse = _bound(batch, believed, self.cap, *self._draw(batch))
            found = row_lse, col_lse
            self._remember(found, samples, has_negatives, batch)
        self._note(believed, found, has_negatives, batch)
        return loss

    def stats(self) -> dict[str, Tensor]:
        """Numbers to log, each (), on the module's device; the normaliser's, and

        drift: mean over the last training batch of log( sum_j exp(s_ij - log Z_i) ), by row and column, before cap
            and draws: 0 where the weights sum to one, negative where negatives are weighed too low. A batch of one
            sample has none, and counts in neither.
        above_one: share, over all training so far, of those sums above 1: where they are not, no cap can act.
        """
        above, total = self.weight_sums.unbind()
        return {**self.normalizer.stats(), "drift": self.drift.clone(), "above_one": above / total.clamp(min=1)}

    def extra_repr(self) -> str:
        return (
            f"num_samples={self.num_samples}, mode={self.mode!r}, cap={self.cap}, symmetric={self.symmetric}, "
            f"virtual_batch={self.virtual_batch}, init_scale={self.init_scale:.4g}"
        )

    def _scale(self, scale: float | Tensor | None) -> float | Tensor:
        if self.log_scale is None:
            return self.init_scale if scale is None else scale
        if scale is not None:
            raise ValueError("scale is given, but the loss learns its own: expected learnable_scale=False")
        if self.training:
            with torch.no_grad():
                self.log_scale.clamp_(max=math.log(self.max_scale))
        return self.log_scale.exp()

    def _share(self, rows: int, index: Tensor | None) -> RowShare:
        options = {
            "training": self.training,
            "index": index is not None,
            "mode": self.mode,
            "columns": self.symmetric,
            "virtual_batch": self.virtual_batch,
        }
        return RowShare.of("GammaContrastiveLoss", self.group, self.exchange, rows, **options)

    def _remember(self, found: LogNormalizers, samples: Tensor, has_negatives: Tensor, batch: PairBatch) -> None:
        def of_all(own: Tensor) -> Tensor:
            lse = own if batch.share is None else batch.share.gathered(own)
            # Without negatives it is the positive alone, which says nothing of Z.
            return torch.where(has_negatives, lse, torch.nan)

        if batch.total > 1:
            rows, cols = found
            self.normalizer.update(samples, of_all(rows), None if cols is None else of_all(cols), batch)

    def _draw(self, batch: PairBatch) -> tuple[Tensor | None, Tensor | None]:
        if self.draws is None:
            return None, None
        rows = batch.total
        drawn = self.draws(2 * rows if self.symmetric else rows)
        own = slice(0, rows) if batch.share is None else batch.share.own
        return drawn[:rows][own], drawn[rows:][own] if self.symmetric else None

    @torch.no_grad()
    def _note(self, believed: LogNormalizers, found: LogNormalizers, has_negatives: Tensor, batch: PairBatch) -> None:
        pairs = zip(found, believed, strict=True)
        gaps = torch.cat([new - old for new, old in pairs if new is not None and old is not None])
        above, count = (gaps > ROUNDING).sum(), torch.full_like(self.weight_sums[0], len(gaps))
        drift = gaps.mean()
        if batch.share is not None:
            total, above, count = batch.share.summed(torch.stack([gaps.sum(), above.to(gaps), count.to(gaps)])).unbind()
            drift = total / count
        self.drift.copy_(torch.where(has_negatives, drift, self.drift))
        self.weight_sums.add_(torch.where(has_negatives, torch.stack([above, count]).long(), 0))

    def _checked(self, x: Tensor, y: Tensor, index: Tensor | None) -> Tensor | None:
        check_sides(x, y)
        if index is None:
            if not self.training:
                return None
            if getattr(self.normalizer, "needs_index", True) or self.group is not None:
                raise ValueError("index is None: training needs the index of every row's sample")
            return torch.arange(x.shape[0], device=x.device)
        # In eval mode indices only tell equal samples apart, so those of another data set will do.
        into_entries = self.training and getattr(self.normalizer, "by_sample", True)
        return check_index(index, x, self.num_samples if into_entries else None)


def _bound(
    batch: PairBatch,
    log_z: LogNormalizers,
    cap: bool = False,
    row_draws: Tensor | None = None,
    col_draws: Tensor | None = None,
) -> GammaOutput:
    row_log_z, col_log_z = log_z
    return gamma_contrastive(
        batch.x,
        batch.y,
        batch.scale,
        -row_log_z,
        None if col_log_z is None else -col_log_z,
        groups=batch.groups,
        log_multiplier=batch.log_multiplier,
        cap=cap,
        row_draws=row_draws,
        col_draws=col_draws,
        group=batch.group,
        exchange=batch.exchange,
        backend=batch.backend,
    )


@torch.no_grad()
def _log_normalizers(batch: PairBatch) -> LogNormalizers:
    return log_normalizers(
        batch.x,
        batch.y,
        batch.scale,
        positives=torch.arange(batch.x.shape[0], device=batch.x.device),
        groups=batch.groups,
        columns=batch.symmetric,
        log_multiplier=batch.log_multiplier,
        group=batch.group,
        exchange=batch.exchange,
        backend=batch.backend,
    )


def _filled(known: LogNormalizers, fresh: LogNormalizers) -> LogNormalizers:
    """Fresh values where nothing is known."""
    rows, cols = (
        None if old is None or new is None else torch.where(old == -torch.inf, new, old)
        for old, new in zip(known, fresh, strict=True)
    )
    return cast(Tensor, rows), cols


def _with_first_visits(known: LogNormalizers, batch: PairBatch) -> LogNormalizers:
    """The batch's own log-normalisers where nothing is known: a sweep, if there is such a place."""
    if not torch.compiler.is_compiling():
        if batch.x.device.type == "cpu" and not _any_unknown(known[0], batch):
            return known
        return _filled(known, _log_normalizers(batch))
    scale = torch.as_tensor(batch.scale, dtype=accumulation_dtype(batch.x.dtype), device=batch.x.device)
    detached = batch._replace(x=batch.x.detach(), y=batch.y.detach(), scale=scale.detach())
    rows, cols = torch.ops.contrastile.with_first_visits(*known, *detached[:-1])
    return rows, cols if batch.symmetric else None


def _any_unknown(known: Tensor, batch: PairBatch) -> bool:
    unknown = (known == -torch.inf).sum()
    return bool(unknown if batch.share is None else batch.share.summed(unknown))


# Whether some sample is new depends on values, on which a compiled graph cannot branch: to it this is one op.
@torch.library.custom_op("contrastile::with_first_visits", mutates_args=())
def with_first_visits(
    rows: Tensor,
    cols: Tensor | None,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    samples: Tensor,
    symmetric: bool,
    virtual_batch: int,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    batch = PairBatch(x, y, scale, samples, symmetric, virtual_batch, backend)
    filled_rows, filled_cols = _with_first_visits((rows, cols), batch)
    # An op may not return its own arguments.
    return filled_rows.clone(), x.new_empty(0) if filled_cols is None else filled_cols.clone()


@with_first_visits.register_fake
def _(rows: Tensor, cols: Tensor | None, x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), x.new_empty(0) if cols is None else torch.empty_like(cols)


def _check_options(
    num_samples: int, virtual_batch: int, init_scale: float, max_scale: float, mode: str, draws: str
) -> None:
    for name, size in (("num_samples", num_samples), ("virtual_batch", virtual_batch)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 2:
            raise ValueError(f"{name} is {size!r}: expected a whole number of at least 2")
    if not 0 < init_scale <= max_scale < math.inf:
        raise ValueError(f"init_scale is {init_scale} and max_scale {max_scale}: expected 0 < init_scale <= max_scale")
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}: expected one of {', '.join(map(repr, MODES))}")
    if draws not in DRAWS:
        raise ValueError(f"draws is {draws!r}: expected one of {', '.join(map(repr, DRAWS))}")


def _check_normalizer(normalizer: Normalizer, num_samples: int, symmetric: bool, group: Group | None) -> None:
    name = type(normalizer).__name__
    if group is not None and isinstance(normalizer, OF_OWN_EMBEDDINGS):
        raise ValueError(f"normalizer is a {name} over a group: it would differ between processes")
    if isinstance(normalizer, LogNormalizerMemory) and normalizer.num_samples < num_samples:
        raise ValueError(
            f"normalizer is a {name} of {normalizer.num_samples} samples, but num_samples is {num_samples}: "
            f"expected one of at least {num_samples}"
        )
    if isinstance(normalizer, KEEPING_SIDES) and (columns := len(normalizer.level) == 2) != symmetric:
        raise ValueError(
            f"normalizer is a {name} with columns={columns}, but symmetric is {symmetric}: expected columns={symmetric}"
        )
