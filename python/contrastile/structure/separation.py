"""Shared and independent features of each modality: orthogonal by sample, contrasted, and spread on the sphere."""

from __future__ import annotations

from math import log
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contrastile import backends, formulas
from contrastile.autograd import Saved, differentiable_once
from contrastile.distributed import Group
from contrastile.distributed.losses import share
from contrastile.formulas import Wants
from contrastile.functional import log_normalizers, place_of
from contrastile.pairs import Backend, GivenWeights
from contrastile.statistics import finite
from contrastile.structure.batch import BatchRows, check_rows
from contrastile.structure.four_way import augmented, in_modal
from contrastile.structure.row_pass import DotProducts, row_pass, unit_gain
from contrastile.validation import PairInputs, accumulation_dtype, check_alike

__all__ = ["FeatureSeparationLoss", "SeparatingHeads", "feature_separation"]

CLOSENESS = 4.0  # exp(-2 |u - w|^2) = exp(4 <u, w> - 4) for unit rows


def feature_separation(
    v: Tensor,
    t: Tensor,
    v_ind: Tensor,
    t_ind: Tensor,
    v_ind_aug: Tensor | None = None,
    t_ind_aug: Tensor | None = None,
    *,
    scale: float | Tensor,
    printed_denominators: bool = False,
    group: Group | None = None,
    exchange: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Deep feature separation (Jiang et al. 2023, L_Sep): the sum of three terms with unit weights.

        orthogonality   1/N sum_j ( <v_j, v^i_j>^2 + <t_j, t^i_j>^2 )
        contrast        InfoNCE of v^i against v^{i,a}, and of t^i against t^{i,a}, one direction each
        uniformity      log of the mean over j != k of exp(4 <v^i_j, v^i_k> - 4), and the same of t^i

    For unit rows, which all rows are meant to be, the last is log mean exp(-2 |v^i_j - v^i_k|^2) (Wang and Isola 2020,
    t = 2). One pass over rows, and six sweeps over pairs: one a contrast, and two a uniformity.

    Args:
        v, t: shared features, (N, D) each with N >= 2, float16, bfloat16, float32 or float64.
        v_ind, t_ind: independent features, (N, D).
        v_ind_aug, t_ind_aug: independent features of augmented inputs, (N, D): both or neither; without them the
            positive is the row itself, as the paper prints it, which needs printed_denominators.
        scale: 1 / temperature of the contrast, as for `info_nce`.
        printed_denominators: negatives are the batch's own v^i or t^i, the row itself among them, as the paper prints.
        group, exchange, backend: as for `info_nce`; all features are those of own rows, and N >= 2 holds of all
            processes' rows together.

    Returns:
        The loss, (), float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError, RuntimeError: as `info_nce` does.
    """

    def prepare(may_be_empty: bool) -> list[Tensor]:
        if (v_ind_aug is None) != (t_ind_aug is None):
            raise ValueError("one of v_ind_aug and t_ind_aug is given: expected both or neither")
        if v_ind_aug is None and not printed_denominators:
            raise ValueError(
                "v_ind_aug and t_ind_aug are not given: the contrast needs augmented positives, "
                "or printed_denominators=True, with which the positive may be the row itself"
            )
        parts = {"v": v, "t": t, "v_ind": v_ind, "t_ind": t_ind}
        if v_ind_aug is not None and t_ind_aug is not None:
            parts |= {"v_ind_aug": v_ind_aug, "t_ind_aug": t_ind_aug}
        return check_alike(parts, may_be_empty=may_be_empty)

    features, rows = check_rows(
        "feature_separation",
        prepare,
        place_of(group, exchange, backend),
        printed_denominators=printed_denominators,
        augmented=v_ind_aug is not None,
    )
    v, t, v_ind, t_ind, *positives = features
    if rows.total < 2:
        raise ValueError(f"v is {tuple(v.shape)}: the uniformity of one row is undefined, expected at least two")
    gain = unit_gain(v, 1 / rows.total)
    loss = rows.sum(row_pass(DotProducts(difference=False), (v, v_ind, t, t_ind), gain, "sum", backend))
    # A row that is its own positive is InfoNCE of the batch against itself.
    contrast = in_modal if printed_denominators and positives else augmented
    for own, positive in zip((v_ind, t_ind), positives or (v_ind, t_ind), strict=True):
        loss = loss + contrast(own, positive, scale, rows)
    return loss + _uniformity(v_ind, rows) + _uniformity(t_ind, rows)


class FeatureSeparationLoss(nn.Module):
    """`feature_separation` as a module (Jiang et al. 2023). `SeparatingHeads` makes the features.

    Args:
        scale: 1 / temperature of the contrast.
        printed_denominators, group, exchange, backend: as for `feature_separation`.
    """

    def __init__(
        self,
        scale: float = 1 / 0.07,
        *,
        printed_denominators: bool = False,
        group: Group | None = None,
        exchange: str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.printed_denominators = printed_denominators
        self.group = group
        self.exchange = exchange
        self.backend = backend

    def forward(
        self,
        v: Tensor,
        t: Tensor,
        v_ind: Tensor,
        t_ind: Tensor,
        v_ind_aug: Tensor | None = None,
        t_ind_aug: Tensor | None = None,
        scale: float | Tensor | None = None,
    ) -> Tensor:
        """The loss, (). scale in place of the module's; other arguments and errors as `feature_separation`."""
        return feature_separation(
            v,
            t,
            v_ind,
            t_ind,
            v_ind_aug,
            t_ind_aug,
            scale=self.scale if scale is None else scale,
            printed_denominators=self.printed_denominators,
            group=self.group,
            exchange=self.exchange,
            backend=self.backend,
        )


class SeparatingHeads(nn.Module):
    """Two linear heads on a modality's features: one for what the modalities share, one for what is its own.

    Args:
        in_features, out_features: of both heads.

    forward(features (N, in_features)) -> (shared, independent), (N, out_features) each, unit rows.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.shared = nn.Linear(in_features, out_features, bias=False)
        self.independent = nn.Linear(in_features, out_features, bias=False)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.shared(features), dim=-1), F.normalize(self.independent(features), dim=-1)


def _uniformity(z: Tensor, rows: BatchRows) -> Tensor:
    """log of the mean over j != k of exp(4 <z_j, z_k> - 4)."""
    pairs, (group, exchange, backend) = rows.total * (rows.total - 1), rows.place
    if torch.compiler.is_compiling():
        own = torch.arange(len(z), device=z.device)
        lse, _ = log_normalizers(z, z, CLOSENESS, groups=(own, own), columns=False, backend=backend)
        return lse.logsumexp(0) - CLOSENESS - log(pairs)
    sweeps: Backend | str
    if group is None:
        sweeps = backends.resolve(backend, z.device.type, z.dtype)
    else:
        sweeps = share("uniformity", lambda: (_pairs_of(z), None), group, exchange, backend).sweeps
    apply: Any = UniformityFunction.apply
    logarithm: Tensor = apply(z, sweeps, rows)
    return logarithm - CLOSENESS - log(pairs)


class UniformityFunction(torch.autograd.Function):
    """apply(z, backend, rows) -> log sum_{j != k} exp(4 <z_j, z_k>), over the rows of all processes.

    Statistics come before the gradient's sweep, which takes its shift from them: a bound by the rows' norms may lie so
    far above all exponents that no exponential is left.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, backend: Backend | str, rows: BatchRows) -> Tensor:
        ctx.backend, ctx.rows = backend, rows
        shift, total = _closeness(z, backend, rows)
        ctx.save_for_backward(z, shift)
        ctx.formed = _spread(z, shift, backend, rows) if ctx.needs_input_grad[0] else None
        return shift + total.log()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Saved, upstream: Tensor) -> tuple[Tensor | None, None, None]:
        z, shift = saved
        formed, total = ctx.formed or _spread(z, shift, ctx.backend, ctx.rows)
        ctx.formed = None
        of_all = ctx.rows.processes * upstream  # every process has this loss
        gradient = formulas.finished(_pairs_of(z), formed, of_all / total).x
        return None if gradient is None else gradient.to(z.dtype), None, None


def _closeness(z: Tensor, backend: Backend | str, rows: BatchRows) -> tuple[Tensor, Tensor]:
    """(shift, total), () each: exp(shift) * total is the sum over j != k of exp(4 <z_j, z_k>)."""
    stats = formulas.pair_statistics(_pairs_of(z), backend, columns=False)
    largest, sums = rows.of_all(torch.stack([stats.row_max, stats.row_sum], 1)).unbind(1)
    shift = finite(largest.max())
    return shift, (sums * (largest - shift).exp()).sum()


def _spread(z: Tensor, shift: Tensor, backend: Backend | str, rows: BatchRows) -> tuple[formulas.Formed, Tensor]:
    """The gradient of the sum over j != k of exp(4 <z_j, z_k> - shift), and the sum, of the same rounded products."""
    shifts = shift.expand(len(z)).contiguous()
    gain = torch.ones_like(shifts)
    weights = GivenWeights(shifts, gain, shifts, gain, None)
    formed, found = formulas.pair_gradients(_pairs_of(z), weights, Wants(True, False, False), backend)
    assert found.row_mass is not None
    return formed, rows.sum(found.row_mass.sum())


def _pairs_of(z: Tensor) -> PairInputs:
    scale = torch.full((), CLOSENESS, dtype=accumulation_dtype(z.dtype), device=z.device)
    return PairInputs(z, None, scale, None, None, None)
