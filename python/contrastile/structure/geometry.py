"""Geometric consistency between two modalities, exactly, in O(N D^2) time and O(D^2) memory.

With M = V - T and P = V + T, entry (j, k) of M P^T is the sum of both differences that the loss squares:

    M P^T = (V V^T - T T^T) + (V T^T - T V^T)         a symmetric and an antisymmetric matrix

so the two are orthogonal, and with G_M = M^T M, G_P = P^T P and K = P^T M, all (D, D),

    ||M P^T||^2      = <G_M, G_P>  = in-modal + cross-modal
    <M P^T, P M^T>   = <K, K^T>    = in-modal - cross-modal

M is formed before anything is rounded: where V is near T, the difference of the products has no digits left.
Rows are taken in chunks that fit the workspace, so nothing but Gram matrices is kept between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from contrastile import backends
from contrastile.autograd import Saved, differentiable_once
from contrastile.distributed import Group
from contrastile.formulas import outside_autocast
from contrastile.negatives import Place
from contrastile.structure.batch import BatchRows, check_rows
from contrastile.structure.row_pass import DotProducts, row_pass, unit_gain
from contrastile.validation import accumulation_dtype, check_alike, check_number, check_vector

__all__ = ["GeometricConsistencyLoss", "geometric_consistency"]


def geometric_consistency(
    v: Tensor,
    t: Tensor,
    v_aug: Tensor | None = None,
    t_aug: Tensor | None = None,
    *,
    cross_weight: float = 1.0,
    in_weight: float = 1.0,
    row_weights: Tensor | None = None,
    group: Group | None = None,
    backend: str | None = None,
) -> Tensor:
    """Geometric consistency of two modalities (Jiang et al. 2023, L_GC and its augmented form), without any N x N.

        cross_weight / N sum_jk (<v_j, t_k> - <v_k, t_j>)^2 + in_weight / N sum_jk (<v_j, v_k> - <t_j, t_k>)^2

    The two sums are CyCLIP's cross-modal and in-modal consistency (Goel et al. 2022). With v_aug and t_aug:

        + in_weight    / N sum_jk (<v_j, v_k> - <v^a_j, v^a_k>)^2, and the same of t and t^a
        + cross_weight / N sum_j (<v_j, t_j> - <v^a_j, t^a_j>)^2

    Closed form, float32 (float64 for float64 inputs) from the first difference on; docs/structure.md derives it. Up
    to about N = 2 D the N x N product is the cheaper one and is formed. v == t gives exactly 0.

    Args:
        v, t: embeddings of the two modalities, (N, D), rows of one sample each, not necessarily unit; float16,
            bfloat16, float32 or float64.
        v_aug, t_aug: embeddings of augmented inputs, (N, D): both or neither.
        cross_weight, in_weight: numbers of at least 0.
        row_weights: (N,), at least 0, constants: row j counts w_j times, in each role, and N is their sum.
        group: process group whose processes hold the rows of a larger batch, N of all; a process may have none. Three
            (D, D) matrices are summed over it at most, and no features are gathered. The loss is that of the whole
            batch in every process. A gradient is that of the sum of all processes' losses in its own rows, as
            gathering features with torch.distributed.nn gives it, so that the average of DistributedDataParallel is the
            batch's.
        backend: of the augmented positives' pass over rows; the matrix products are PyTorch's.

    Returns:
        The loss, (), float32, or float64 for float64 inputs.

    Raises:
        ValueError: a shape, a device or a value does not fit, e.g. v is (9, 5) but t is (9, 4), or differs between
            processes.
        TypeError: a dtype does not fit.
        RuntimeError: the named backend cannot run, or arguments were refused in another process.
    """

    def prepare(may_be_empty: bool) -> list[Tensor]:
        if (v_aug is None) != (t_aug is None):
            raise ValueError("one of v_aug and t_aug is given: expected both or neither")
        augmented = {} if v_aug is None or t_aug is None else {"v_aug": v_aug, "t_aug": t_aug}
        alike = check_alike({"v": v, "t": t, **augmented}, may_be_empty=may_be_empty)
        check_number("cross_weight", cross_weight, 0)
        check_number("in_weight", in_weight, 0)
        return alike if row_weights is None else [*alike, _check_weights(row_weights, alike[0])]

    is_augmented, is_weighted = v_aug is not None, row_weights is not None
    features, rows = check_rows(
        "geometric_consistency",
        prepare,
        Place(group, None, backend if is_augmented else None),
        cross_weight=cross_weight,
        in_weight=in_weight,
        row_weights=is_weighted,
        augmented=is_augmented,
    )
    weights = features.pop() if is_weighted else None
    v, t, *augmented_rows = features
    count = rows.total if weights is None else _sum_of_weights(weights, rows)
    roots = None if weights is None else weights.sqrt()
    with outside_autocast(v.device):
        loss = _consistency(v, t, roots, in_weight, cross_weight, group)
        if augmented_rows:
            v_aug, t_aug = augmented_rows
            loss = loss + _consistency(v, v_aug, roots, in_weight, 0.0, group)
            loss = loss + _consistency(t, t_aug, roots, in_weight, 0.0, group)
            gain = unit_gain(v, 1.0) if weights is None else weights
            positives = row_pass(DotProducts(difference=True), (v, t, v_aug, t_aug), gain, "sum", backend)
            loss = loss + cross_weight * rows.sum(positives)
        return loss / count


class GeometricConsistencyLoss(nn.Module):
    """`geometric_consistency` as a module (Jiang et al. 2023).

    Args:
        cross_weight, in_weight, group, backend: as for `geometric_consistency`. CyCLIP (Goel et al. 2022) is
            0.25 and 0.25 beside its contrastive loss.

    Raises:
        ValueError, TypeError: a weight is not a number of at least 0.
    """

    def __init__(
        self,
        cross_weight: float = 1.0,
        in_weight: float = 1.0,
        *,
        group: Group | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.cross_weight = check_number("cross_weight", cross_weight, 0)
        self.in_weight = check_number("in_weight", in_weight, 0)
        self.group = group
        self.backend = backend

    def forward(
        self,
        v: Tensor,
        t: Tensor,
        v_aug: Tensor | None = None,
        t_aug: Tensor | None = None,
        row_weights: Tensor | None = None,
    ) -> Tensor:
        """The loss, (). Arguments and errors are those of `geometric_consistency`."""
        return geometric_consistency(
            v,
            t,
            v_aug,
            t_aug,
            cross_weight=self.cross_weight,
            in_weight=self.in_weight,
            row_weights=row_weights,
            group=self.group,
            backend=self.backend,
        )


def _check_weights(row_weights: Tensor, v: Tensor) -> Tensor:
    weights = check_vector("row_weights", row_weights, len(v), v)
    if _has_values(weights) and not bool((weights >= 0).all()):
        raise ValueError(f"row_weights of shape {tuple(weights.shape)} holds entries that are not at least 0")
    return weights


def _sum_of_weights(weights: Tensor, rows: BatchRows) -> Tensor:
    """Of all processes, ()."""
    total = rows.sum(weights.sum())
    if _has_values(weights) and not bool(total > 0):
        raise ValueError(f"row_weights of shape {tuple(weights.shape)} are all 0: no rows are left")
    return total


def _has_values(tensor: Tensor) -> bool:
    """To look at without waiting for a device."""
    return not torch.compiler.is_compiling() and tensor.device.type == "cpu"


class _Weights(NamedTuple):
    in_modal: float
    cross_modal: float

    @property
    def product(self) -> float:
        """Of <G_M, G_P>."""
        return (self.in_modal + self.cross_modal) / 2

    @property
    def transposed(self) -> float:
        """Of <K, K^T>."""
        return (self.in_modal - self.cross_modal) / 2

    def prefers_pairs(self, rows: int, depth: int) -> bool:
        """Three N x N x D products cost less than those of Gram matrices: two forward and two backward, or three and
        four where K takes part.
        """
        return 3 * rows <= (7 if self.transposed else 4) * depth


def _consistency(
    v: Tensor, t: Tensor, roots: Tensor | None, in_weight: float, cross_weight: float, group: Group | None
) -> Tensor:
    """N times the loss. roots: square roots of the rows' weights, (N,)."""
    weights = _Weights(in_weight, cross_weight)
    if torch.compiler.is_compiling() and group is None:
        return _value(_gram_matrices(*_difference_and_sum(v, t, roots), weights), weights)
    apply: Any = _ConsistencyFunction.apply
    loss: Tensor = apply(v, t, roots, weights, group)
    return loss


class _ConsistencyFunction(torch.autograd.Function):
    """apply(v, t, roots or None, weights, group or None) -> loss."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, t: Tensor, roots: Tensor | None, weights: _Weights, group: Any) -> Tensor:
        ctx.weights, ctx.processes = weights, 1 if group is None else distributed.get_world_size(group)
        if group is None and weights.prefers_pairs(*v.shape):
            difference, total = _difference_and_sum(v, t, roots)
            pairs = difference @ total.T
            ctx.save_for_backward(v, t, roots, pairs)
            in_modal, cross_modal = _symmetric_parts(pairs)
            return weights.in_modal * in_modal.square().sum() + weights.cross_modal * cross_modal.square().sum()
        grams = _summed_gram_matrices(v, t, roots, weights)
        if group is not None:
            distributed.all_reduce(grams, group=group)
        ctx.save_for_backward(v, t, roots, None, grams)
        return _value(grams, weights)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Saved, upstream: Tensor) -> tuple[Tensor | None, ...]:
        v, t, roots, pairs, *grams = saved
        with outside_autocast(v.device):
            if pairs is None:
                gradients = _gradients_by_grams(v, t, roots, grams[0], 2 * ctx.processes * upstream, ctx.weights)
            else:
                gradients = _gradients_by_pairs(v, t, roots, pairs, 2 * upstream, ctx.weights)
        wanted = ctx.needs_input_grad[:2]
        return (*(g if want else None for g, want in zip(gradients, wanted, strict=True)), None, None, None)


def _difference_and_sum(v: Tensor, t: Tensor, roots: Tensor | None) -> tuple[Tensor, Tensor]:
    """M and P of some rows, each times the root of its weight, in the accumulation dtype."""
    dtype = accumulation_dtype(v.dtype)
    v, t = v.to(dtype), t.to(dtype)
    difference, total = v - t, v + t
    if roots is None:
        return difference, total
    return difference * roots[:, None], total * roots[:, None]


def _gram_matrices(difference: Tensor, total: Tensor, weights: _Weights) -> Tensor:
    """G_M, G_P, and K where it takes part: (2 or 3, D, D)."""
    found = [difference.T @ difference, total.T @ total]
    return torch.stack([*found, total.T @ difference] if weights.transposed else found)


def _value(grams: Tensor, weights: _Weights) -> Tensor:
    value = weights.product * (grams[0] * grams[1]).sum()
    return value + weights.transposed * (grams[2] * grams[2].T).sum() if weights.transposed else value


def _summed_gram_matrices(v: Tensor, t: Tensor, roots: Tensor | None, weights: _Weights) -> Tensor:
    depth = v.shape[1]
    grams = v.new_zeros((3 if weights.transposed else 2, depth, depth), dtype=accumulation_dtype(v.dtype))
    for rows in _chunks(v):
        difference, total = _difference_and_sum(v[rows], t[rows], None if roots is None else roots[rows])
        grams[0].addmm_(difference.T, difference)
        grams[1].addmm_(total.T, total)
        if weights.transposed:
            grams[2].addmm_(total.T, difference)
    return grams


def _gradients_by_grams(
    v: Tensor, t: Tensor, roots: Tensor | None, grams: Tensor, factor: Tensor, weights: _Weights
) -> tuple[Tensor, Tensor]:
    """factor times dM = product M G_P + transposed P K^T, dP = product P G_M + transposed M K; from them dV and dT."""
    gram_difference, gram_total = grams[0] * (weights.product * factor), grams[1] * (weights.product * factor)
    mixed = grams[2] * (weights.transposed * factor) if weights.transposed else None
    dv, dt = torch.empty_like(v), torch.empty_like(t)
    for rows in _chunks(v):
        root = None if roots is None else roots[rows]
        difference, total = _difference_and_sum(v[rows], t[rows], root)
        d_difference, d_total = difference @ gram_total, total @ gram_difference
        if mixed is not None:
            d_difference.addmm_(total, mixed.T)
            d_total.addmm_(difference, mixed)
        dv[rows], dt[rows] = _of_both(d_difference, d_total, root)
    return dv, dt


def _gradients_by_pairs(
    v: Tensor, t: Tensor, roots: Tensor | None, pairs: Tensor, factor: Tensor, weights: _Weights
) -> tuple[Tensor, Tensor]:
    difference, total = _difference_and_sum(v, t, roots)
    in_modal, cross_modal = _symmetric_parts(pairs)
    d_pairs = factor * (weights.in_modal * in_modal + weights.cross_modal * cross_modal)
    dv, dt = _of_both(d_pairs @ total, d_pairs.T @ difference, roots)
    return dv.to(v.dtype), dt.to(t.dtype)


def _symmetric_parts(pairs: Tensor) -> tuple[Tensor, Tensor]:
    return (pairs + pairs.T) / 2, (pairs - pairs.T) / 2


def _of_both(d_difference: Tensor, d_total: Tensor, roots: Tensor | None) -> tuple[Tensor, Tensor]:
    """dV and dT from dM and dP, in whose place dV comes."""
    dt = d_total - d_difference
    dv = d_difference.add_(d_total)
    return (dv, dt) if roots is None else (dv.mul_(roots[:, None]), dt.mul_(roots[:, None]))


def _chunks(v: Tensor) -> Iterator[slice]:
    """Rows whose widened inputs, M and P, and gradients of all, fit the workspace; half of it, for what an allocator
    cannot use again at once.
    """
    entries = backends.workspace_bytes() // accumulation_dtype(v.dtype).itemsize
    size = max(1, entries // (16 * v.shape[1]))
    return (slice(first, first + size) for first in range(0, len(v), size))
