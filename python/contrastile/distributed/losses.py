"""The losses of contrastile.functional over a group: arguments and results are those of their namesakes there.

Sums over a process's own rows come from the same autograd functions as in one process, over GroupSweeps; the loss is
their sum over the group. Its gradient is that of the sum of all processes' losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contrastile import autograd, backends, formulas, formulas_negatives, formulas_siglip
from contrastile.distributed.agreement import Facts, Sizes, agree
from contrastile.distributed.member import Group, Member, summed_over
from contrastile.distributed.plans import EXCHANGES, Plan, chosen_plan
from contrastile.distributed.sweeps import GroupSweeps
from contrastile.formulas import NOTHING, GammaTerms, Wants, wants_of
from contrastile.formulas_negatives import LogNegatives
from contrastile.pairs import Backend
from contrastile.softmax_terms import SoftmaxTerms
from contrastile.validation import PairInputs, accumulation_dtype, check_log_multiplier, check_reduction

Terms = GammaTerms | SoftmaxTerms | Tensor | None  # a tensor is the sigmoid loss' bias


class Shared(NamedTuple):
    """Checked arguments, of which every process has its share."""

    inputs: PairInputs
    terms: Terms
    wants: Wants
    sweeps: Backend | str
    sizes: Sizes
    group: Group
    exchange: str | None

    def plan_of_sums(self, sizes: Sequence[int], like: Tensor) -> Plan:
        """For sums (sizes[rank], D) by column, of the dtype of like (..., D), where no features travel."""
        return chosen_plan(Member(self.group), self.exchange, sizes, like.shape[-1], 0, like.dtype.itemsize)

    def reduced(self, local: Tensor, reduction: str) -> Tensor:
        """The loss from its sum over own rows."""
        if reduction == "none":
            return local
        total = summed_over(local, self.group)
        return total / sum(self.sizes.rows) if reduction == "mean" else total


Prepare = Callable[[], tuple[PairInputs, Terms]]


def share(
    function: str,
    prepare: Prepare,
    group: Group,
    exchange: str | None,
    backend: str | None,
    *,
    reduction: str = "none",
    log_multiplier: float = 0.0,
    **options: object,
) -> Shared:
    """Checks the arguments of all processes against each other, and chooses the plan.

    Args:
        function, reduction, log_multiplier, options: what must be equal in all processes.
        prepare: checks own arguments.
    """
    member = Member(group)

    def described() -> tuple[Facts, tuple[PairInputs, Terms, Wants, str]]:
        check_reduction(reduction)
        check_log_multiplier(log_multiplier)
        inputs, terms = prepare()
        if exchange is not None and exchange not in EXCHANGES:
            raise ValueError(f"exchange is {exchange!r}: expected None or one of {', '.join(map(repr, EXCHANGES))}")
        x, scale = inputs.x, inputs.scale
        if x.device.type not in member.device_types:
            served = " and ".join(member.device_types)
            raise ValueError(f"the embeddings are on {x.device}, but the group exchanges tensors on {served}")
        wants = wants_of(inputs)
        common = {
            "function": function,
            "reduction": reduction,
            "log_multiplier": float(log_multiplier),
            **options,
            "exchange": exchange,
            "features": x.shape[1],
            "dtype": str(x.dtype).removeprefix("torch."),
            "scale": "one" if scale.dim() == 0 else "by row",
            "gradients": ",".join(name for name, want in zip(("x", "y", "scale"), wants, strict=True) if want),
            "positives": inputs.positives is not None,
            "groups": inputs.row_groups is not None,
        }
        if isinstance(terms, Tensor):
            common["bias"] = f"{float(terms.detach()):.6g}"
            common["bias gradient"] = terms.requires_grad
        rows, cols = len(x), len(x if inputs.y is None else inputs.y)
        one = float(scale.detach()) if scale.dim() == 0 else float("nan")
        name = backends.resolve(backend, x.device.type, x.dtype)
        return Facts(rows, cols, one, common), (inputs, terms, wants, name)

    sizes, (inputs, terms, wants, name) = agree(member, described)
    sweeps: Backend | str = name
    if member.size > 1:
        sums = accumulation_dtype(inputs.x.dtype).itemsize if any(wants) and not inputs.self_similarity else 0
        plan = chosen_plan(member, exchange, sizes.cols, inputs.x.shape[1], inputs.x.dtype.itemsize, sums)
        sweeps = GroupSweeps(plan, name)
    return Shared(inputs, terms, wants, sweeps, sizes, group, exchange)


def info_nce(shared: Shared, symmetric: bool, reduction: str) -> Tensor:
    """InfoNCE, and NT-Xent where the inputs are views of one batch."""
    own = "none" if reduction == "none" else "sum"
    if any(shared.wants):
        apply: Any = autograd.InfoNCEFunction.apply
        local = apply(*shared.inputs, symmetric, own, shared.sweeps)
    else:
        local = formulas.info_nce_forward(shared.inputs, symmetric, own, NOTHING, shared.sweeps)[0]
    return shared.reduced(local, reduction)


def gamma_contrastive(shared: Shared, reduction: str) -> tuple[Tensor, Tensor, Tensor | None]:
    own = "none" if reduction == "none" else "sum"
    assert isinstance(shared.terms, GammaTerms)
    if any(shared.wants):
        apply: Any = autograd.GammaContrastiveFunction.apply
        local, row_lse, col_lse = apply(*shared.inputs, *shared.terms, own, shared.sweeps)
    else:
        found = formulas.gamma_forward(shared.inputs, shared.terms, own, NOTHING, shared.sweeps)
        local, row_lse, col_lse = found[:3]
    return shared.reduced(local, reduction), row_lse, col_lse


def siglip(shared: Shared, reduction: str) -> Tensor:
    own, bias = "none" if reduction == "none" else "sum", shared.terms
    assert isinstance(bias, Tensor)
    if any(shared.wants) or (torch.is_grad_enabled() and bias.requires_grad):
        apply: Any = autograd.SigLipFunction.apply
        local = apply(*shared.inputs, bias, own, shared.sweeps)
    else:
        local = formulas_siglip.siglip_forward(shared.inputs, bias, own, NOTHING, False, shared.sweeps)[0]
    return shared.reduced(local, reduction)


def log_normalizers(shared: Shared, columns: bool, log_multiplier: float) -> tuple[Tensor, Tensor | None]:
    if any(shared.wants):
        apply: Any = autograd.LogNormalizersFunction.apply
        row_lse, col_lse = apply(*shared.inputs, columns, log_multiplier, shared.sweeps)
        return row_lse, col_lse
    return formulas.log_normalizers_forward(shared.inputs, columns, log_multiplier, shared.sweeps)[:2]


def log_negatives(shared: Shared, columns: bool) -> LogNegatives:
    if any(shared.wants):
        apply: Any = autograd.LogNegativesFunction.apply
        return LogNegatives(*apply(*shared.inputs, columns, shared.sweeps))
    return formulas_negatives.log_negatives_forward(shared.inputs, columns, shared.sweeps)[0]
