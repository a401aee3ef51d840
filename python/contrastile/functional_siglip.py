"""The sigmoid loss as a function, in the manner of functional.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contrastile import autograd, backends, formulas_siglip
from contrastile.distributed import Group
from contrastile.distributed import losses as shared_losses
from contrastile.formulas import NOTHING, wants_of
from contrastile.functional import check_alone
from contrastile.validation import Groups, PairInputs, check_bias, check_pairs, check_reduction
from contrastile.version import __version__

__all__ = ["siglip"]


def siglip(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    bias: float | Tensor,
    *,
    positives: Tensor | None = None,
    groups: Groups | None = None,
    reduction: str = "mean",
    group: Group | None = None,
    exchange: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sigmoid loss over all pairs of a batch, without the N x M matrix (Zhai et al. 2023, SigLIP, algorithm 1).

        l_i = - log sigmoid(s_i,pos + bias) - sum_neg log sigmoid(-(s_ij + bias))        s_ij = scale_i <x_i, y_j>

    Every pair is judged on its own, so the loss is one sweep in the forward, whose gradients the backward multiplies.
    Sums are accumulated in float32, in float64 for float64 inputs. Second derivatives: `contrastile.reference.siglip`.

    Args:
        x: anchors, (N, D). y: candidates, (M, D). scale, positives, reduction, group, exchange, backend: as for
            `info_nce`. positives need not be distinct: a column may be several rows' positive, or nobody's.
        bias: one number that is added to all logits, a number or a tensor (), which gets a gradient. SigLIP starts
            from scale 10 and bias -10, so that the many negatives do not outweigh the positives at first.
        groups: (row_ids (N,), col_ids (M,)), integers: a pair of equal ids other than the positive is left out.

    Returns:
        The loss, () or (N,), float32, or float64 for float64 inputs; "mean" is over rows, each with all its pairs.

    Raises:
        ValueError: a shape, a device or a value does not fit, e.g. bias has shape (3,): expected a number or ().
        TypeError, RuntimeError: as `info_nce` does.
    """

    def checked(may_be_empty: bool) -> tuple[PairInputs, Tensor]:
        inputs = check_pairs(x, y, scale, positives, groups, both_directions=False, may_be_empty=may_be_empty)
        return inputs, check_bias(bias, inputs.x)

    if group is not None:
        shared = shared_losses.share(
            "siglip",
            lambda: checked(may_be_empty=True),
            group,
            exchange,
            backend,
            reduction=reduction,
        )
        return shared_losses.siglip(shared, reduction)
    check_alone(exchange)
    check_reduction(reduction)
    inputs, moved_by = checked(may_be_empty=False)
    name = backends.resolve(backend, inputs.x.device.type, inputs.x.dtype)
    wants, wants_bias = wants_of(inputs), torch.is_grad_enabled() and moved_by.requires_grad
    if torch.compiler.is_compiling():
        loss: Tensor = torch.ops.contrastile.siglip(
            *inputs, moved_by, reduction, *wants, wants_bias, name, __version__
        )[0]
        return loss
    if autograd.needs_no_derivative((*wants, wants_bias), *inputs[:3], moved_by):
        return formulas_siglip.siglip_forward(inputs, moved_by, reduction, NOTHING, False, name)[0]
    apply: Any = autograd.SigLipFunction.apply
    loss = apply(*inputs, moved_by, reduction, name)
    return loss
