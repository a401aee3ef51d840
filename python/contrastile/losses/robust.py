"""The robust global contrastive loss: a temperature of its own for every sample, learned along with the encoders."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from contrastile import backends
from contrastile.autograd import Saved, differentiable_once
from contrastile.distributed import Group, RowShare, refusals_told
from contrastile.distributed import losses as shared_losses
from contrastile.formulas import Gradients, Wants, complete, pair_gradients, pair_statistics
from contrastile.functional import check_alone
from contrastile.losses.samples import check_index, check_sides
from contrastile.normalizer import UPDATE_RATE, LogNormalizerMemory, PairBatch, count_of_equals
from contrastile.pairs import Backend, GivenWeights
from contrastile.temperatures import SampleTemperatures
from contrastile.validation import PairInputs, accumulation_dtype, check_pairs


class RobustContrastiveLoss(nn.Module):
    """Global contrastive loss with a temperature for every sample and side, from small batches (iSogCLR).

        F_i = r_i log mean_j exp(h_ij / r_i) + rho r_i,      h_ij = init_scale (<x_i, y_j> - <x_i, y_i>)

    with j over all samples but i, averaged over samples and, if symmetric, over both sides; the temperature of a row is
    r_i / init_scale. It is the article's objective times init_scale, equation 6 of Qiu et al., "Not all semantics are
    created equal: contrastive self-supervised learning with automatic temperature individualization", ICML 2023: the
    worst case over weights of the negatives whose divergence from equal ones is rho at most. Where r_i = 1 stays,
    SogCLR: Yuan et al., "Provable stochastic optimization for global contrastive learning", ICML 2022.

    A moving average u_i stands for the mean over all samples, with the batch taken in first. Reported is
    r_i (log u_i + m_i / u_i - 1 + rho), m_i the batch's mean: at least F_i of the batch, with equality at u_i = m_i,
    and with the articles' gradients. The same sweep finds dF_i / dr_i, which then moves the sample's temperature.

    Column j's temperature is not row i's, so that each side is a sweep of its own: 4 products in one direction, 8 in
    both. State: 12 bytes a sample and direction. Gradients are formed in the forward. torch.compile breaks its graph
    here.

    In eval mode nothing is remembered, r_i = 1, and u_i is the batch's own. index may then be None.

    Under DistributedDataParallel: as for `GammaContrastiveLoss`.

    Args:
        num_samples: size of the data set that indices run over, at least 2.
        temperatures: a SampleTemperatures of as many samples, with columns if symmetric.
        init_scale: 1 / temperature at r_i = 1.
        update_rate: share of the batch in the remembered average, in (0, 1].
        symmetric: both directions, else the rows of x alone.
        group, exchange, backend: as for `info_nce`. Averages and temperatures take in what all processes found, and so
            stay equal in all of them. Without a group each process has its own.

    Raises:
        ValueError: an option is out of its range, or temperatures are of other samples or sides.
        TypeError: temperatures is no SampleTemperatures.
    """

    def __init__(
        self,
        num_samples: int,
        temperatures: SampleTemperatures,
        *,
        init_scale: float = 1 / 0.07,
        update_rate: float = UPDATE_RATE,
        symmetric: bool = True,
        group: Group | None = None,
        exchange: str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 2:
            raise ValueError(f"num_samples is {num_samples!r}: expected a whole number of at least 2")
        if not 0 < init_scale < math.inf:
            raise ValueError(f"init_scale is {init_scale}: expected a finite number above 0")
        if not isinstance(temperatures, SampleTemperatures):
            raise TypeError(f"temperatures is {type(temperatures).__name__}: expected a SampleTemperatures")
        wanted = (2 if symmetric else 1, num_samples)
        if temperatures.relative.shape != wanted:
            found = tuple(temperatures.relative.shape)
            raise ValueError(f"temperatures are {found}, by side and sample: expected {wanted}")
        self.num_samples = num_samples
        self.temperatures = temperatures
        self.normalizer = LogNormalizerMemory(num_samples, update_rate=update_rate, columns=symmetric)
        self.init_scale = init_scale
        self.symmetric = symmetric
        self.group = group
        self.exchange = exchange
        self.backend = backend

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor, y: Tensor, index: Tensor | None) -> Tensor:
        """The bound, (), float32, or float64 for float64 inputs.

        Two rows of equal index are one sample, hence no negatives of each other. Where all rows of a batch are one
        sample, the loss is 0 and nothing is learned.

        Args:
            x, y: the two sides of B pairs, (B, D) each, used as given: normalise them first.
            index: which samples these are, (B,) integers from 0 to num_samples - 1.

        Raises:
            ValueError: x and y differ in rows; index has another length, or leaves its range (looked at on a CPU
                only); index is missing in training.
            TypeError: index holds no integers.
            ValueError, TypeError, RuntimeError: as `info_nce` does.
        """
        check_alone(None if self.group is not None else self.exchange)
        with nullcontext() if self.group is None else refusals_told(self.group):
            index = self._checked(x, y, index)
        batch = self._batch(x, y, index)
        wants_x, wants_y = (torch.is_grad_enabled() and side.requires_grad for side in (x, y))
        with torch.no_grad():
            value, dx, dy = self._formed(batch, wants_x, wants_y)
        apply: Any = _GivenGradients.apply
        loss: Tensor = apply(x, y, value, dx, dy)
        return loss

    def stats(self) -> dict[str, Tensor]:
        """Numbers to log, each (), on the module's device: those of the memory and of the temperatures."""
        return {**self.normalizer.stats(), **self.temperatures.stats()}

    def extra_repr(self) -> str:
        return f"num_samples={self.num_samples}, init_scale={self.init_scale:.4g}, symmetric={self.symmetric}"

    def _checked(self, x: Tensor, y: Tensor, index: Tensor | None) -> Tensor | None:
        check_sides(x, y)
        if index is not None:
            return check_index(index, x, self.num_samples if self.training else None)
        if self.training:
            raise ValueError("index is None: training needs the index of every row's sample")
        return None

    def _batch(self, x: Tensor, y: Tensor, index: Tensor | None) -> PairBatch:
        share = None
        if self.group is not None:
            options = {"training": self.training, "index": index is not None, "columns": self.symmetric}
            share = RowShare.of("RobustContrastiveLoss", self.group, self.exchange, len(x), **options)
        # The articles average means as they were found, at whatever temperature: a scale and a count of 1 keep it so.
        return PairBatch(x, y, 1.0, index, self.symmetric, 1, self.backend, share)

    def _formed(self, batch: PairBatch, wants_x: bool, wants_y: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The loss and its gradients in x and y, where they are wanted; in training takes the batch's samples in."""
        x, y, index = batch.x, batch.y, batch.samples
        visited = index if self.training else None
        pairs = [(x, y, wants_x, wants_y), (y, x, wants_y, wants_x)][: 2 if self.symmetric else 1]
        relative = torch.ones(len(pairs), len(x), device=x.device) if visited is None else self.temperatures(visited)
        relative = relative.to(accumulation_dtype(x.dtype))
        others = batch.total - _equals(batch, relative)
        sides = [
            _Side.of(batch, anchors, candidates, r, self.init_scale, others)
            for (anchors, candidates, *_), r in zip(pairs, relative, strict=True)
        ]
        log_u = torch.stack([side.log_mean for side in sides])
        if visited is not None:
            log_u = self._remembered(visited, log_u, batch)
        rho, share = self.temperatures.rho, 1 / (len(pairs) * batch.total)  # of a row in the mean
        value = share * torch.stack([side.values(u, rho) for side, u in zip(sides, log_u, strict=True)]).sum()
        gradients = [
            side.gradients(u, share, Wants(wants_a, wants_c, visited is not None))
            for side, u, (*_, wants_a, wants_c) in zip(sides, log_u, pairs, strict=True)
        ]
        if visited is not None:
            slopes = [side.slopes(u, rho, share, g) for side, u, g in zip(sides, log_u, gradients, strict=True)]
            self.temperatures.update(*_of_all(batch, visited, torch.stack(slopes)))
        dx, dy, _ = gradients[0]
        if self.symmetric:
            dx, dy = _sum(dx, gradients[1].y), _sum(dy, gradients[1].x)
        if batch.share is None:
            return value, dx, dy
        # Every process has the whole batch's loss; a gradient is that of their sum.
        dx, dy = (None if g is None else g.mul_(batch.share.member.size) for g in (dx, dy))
        return batch.share.summed(value), dx, dy

    def _remembered(self, index: Tensor, log_mean: Tensor, batch: PairBatch) -> Tensor:
        """log u after this batch, (sides, B)."""
        samples, found = _of_all(batch, index, log_mean)
        rows, cols = (*found, None)[:2]
        self.normalizer.update(samples, rows, cols, batch)
        return torch.stack([u for u in self.normalizer.estimate(index, batch) if u is not None]).to(log_mean.dtype)


def _equals(batch: PairBatch, like: Tensor) -> Tensor:
    """How many rows of the whole batch are a row's sample, (B,)."""
    if batch.samples is None:
        return torch.ones_like(like[0])
    if batch.share is None:
        return count_of_equals(batch.samples).to(like)
    return count_of_equals(batch.share.gathered(batch.samples))[batch.share.own].to(like)


def _of_all(batch: PairBatch, index: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """index (B,) and values (sides, B) of all processes."""
    if batch.share is None:
        return index, values
    return batch.share.gathered(index), batch.share.gathered(values.T.contiguous()).T


class _Side(NamedTuple):
    """One direction of a batch after its statistics sweep; (B,) each, accumulation dtype."""

    inputs: PairInputs  # scale: init_scale / r_i
    relative: Tensor  # r_i
    positive: Tensor  # logits of the positives
    negatives: Tensor  # their number
    log_mean: Tensor  # log mean_j exp(h_ij / r_i); -inf without negatives
    backend: Backend | str

    @classmethod
    def of(
        cls, batch: PairBatch, anchors: Tensor, candidates: Tensor, relative: Tensor, scale: float, others: Tensor
    ) -> _Side:
        def prepare() -> tuple[PairInputs, None]:
            empty = batch.share is not None
            scales = scale / relative
            pairs = anchors, candidates, scales, None, batch.groups
            return check_pairs(*pairs, both_directions=False, may_be_empty=empty), None

        backend: Backend | str
        if batch.group is None:
            inputs, _ = prepare()
            backend = backends.resolve(batch.backend, anchors.device.type, inputs.x.dtype)
        else:
            with torch.enable_grad():  # the plan depends on whether gradients are wanted
                shared = shared_losses.share(
                    "RobustContrastiveLoss", prepare, batch.group, batch.exchange, batch.backend
                )
            inputs, backend = shared.inputs, shared.sweeps
        stats = pair_statistics(inputs, backend, columns=False)
        positive = stats.positive_logit
        assert positive is not None
        log_mean = stats.row_max + stats.row_sum.log() - positive - others.log()
        log_mean = torch.where(others > 0, log_mean, -torch.inf)
        return cls(inputs, relative, positive, others, log_mean, backend)

    def mass(self, log_u: Tensor) -> Tensor:
        """sum_j w_ij with w_ij = exp(h_ij / r_i) / (negatives u_i), (B,)."""
        return torch.where(self.negatives > 0, (self.log_mean - log_u).exp(), 0)

    def values(self, log_u: Tensor, rho: float) -> Tensor:
        """The loss by row, (B,)."""
        values = self.relative * (log_u + self.mass(log_u) - 1 + rho)
        return torch.where(self.negatives > 0, values, 0)

    def gradients(self, log_u: Tensor, share: float, wants: Wants) -> Gradients:
        """Of share * sum_i values_i, in anchors, candidates and each row's scale."""
        if not any(wants):
            return Gradients(None, None, None)
        gain = share * self.relative
        shift = torch.where(self.negatives > 0, log_u + self.positive + self.negatives.log(), 0)
        # A row's coefficients sum to zero: what its scale gets is of margins, whatever constant its logits share.
        weights = GivenWeights(shift, gain, None, None, positive_coeff=-gain * self.mass(log_u))
        gradients = complete(self.inputs, pair_gradients(self.inputs, weights, wants, self.backend)[0])
        assert gradients is not None
        return gradients

    def slopes(self, log_u: Tensor, rho: float, share: float, gradients: Gradients) -> Tensor:
        """dF_i / dr_i = log u_i + rho - sum_j w_ij h_ij / r_i, (B,). NaN where there is nothing to learn."""
        assert gradients.scale is not None
        margins = gradients.scale * self.inputs.scale / (share * self.relative)
        return torch.where(self.negatives > 0, log_u + rho - margins, torch.nan)


class _GivenGradients(torch.autograd.Function):
    """apply(x, y, loss, dx, dy) -> loss, with these gradients, in the accumulation dtype or None where not wanted."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, loss: Tensor, dx: Tensor | None, dy: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, y, dx, dy)
        return loss.clone()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Saved, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, y, dx, dy = saved
        pairs = ((x, dx), (y, dy))
        return *(None if g is None else (upstream * g).to(of.dtype) for of, g in pairs), None, None, None


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else first.add_(second)
